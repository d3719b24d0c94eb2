--- Argument checks. Each raises `function: argument 'name': expected ..., got ...` at the user's line.
-- @module cuflash.checks

local ffi = require "ffi"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"
local native = require "cuflash.native"

local checks = {}

local C = native.C
local raise = errors.raise
local is_tensor = handle.is_tensor
local shape_text = handle.shape_text

local MAX_DIMS = tonumber(C.CUFLASH_MAX_DIMS)
local EXACT = 2 ^ 53 -- whole numbers up to here are exact in a double
local int64, uint64 = ffi.typeof "int64_t", ffi.typeof "uint64_t"

--- A value in words, for "got ...".
-- @function describe
function checks.describe(value)
  local kind = type(value)
  if kind == "number" then return ("%.14g"):format(value) end
  if kind == "string" then
    return "'" .. (#value > 60 and value:sub(1, 57) .. "..." or value):gsub("%c", "?") .. "'"
  end
  if kind == "nil" or kind == "boolean" then return tostring(value) end
  if is_tensor(value) then
    if handle.is_freed(value) then return "a tensor that was freed" end
    return ("a %s tensor %s"):format(dtype.of(value).name, shape_text(handle.sizes(value)))
  end
  if kind == "cdata" then return tostring(value):match("^cdata<.->") or tostring(value) end
  return "a " .. kind
end

local describe = checks.describe

--- Raises about one argument, or about a place in one that takes several words ("dimension 2").
-- @function fail
function checks.fail(name, argument, expected, value)
  local place = argument:find(" ", 1, true) and argument or ("argument '%s'"):format(argument)
  raise("%s: %s: expected %s, got %s", name, place, expected, describe(value))
end

local fail = checks.fail

--- A finite or infinite number; NaN where allowed by any.
-- @function number
function checks.number(name, argument, value)
  if type(value) == "number" then return value end
  if ffi.istype(int64, value) or ffi.istype(uint64, value) then return tonumber(value) end
  return fail(name, argument, "a number", value)
end

--- A number that is neither NaN nor infinite.
-- @function finite
function checks.finite(name, argument, value)
  value = checks.number(name, argument, value)
  if value ~= value or value == math.huge or value == -math.huge then fail(name, argument, "a finite number", value) end
  return value
end

--- A whole number from low to high.
-- @function integer
function checks.integer(name, argument, value, low, high)
  local n = value
  if ffi.istype(int64, n) or ffi.istype(uint64, n) then n = tonumber(n) end
  if type(n) ~= "number" or n ~= math.floor(n) or n < low or n > high then
    local range = high >= EXACT and ("a whole number of at least %d"):format(low)
      or ("a whole number from %d to %d"):format(low, high)
    fail(name, argument, range, value)
  end
  return n
end

--- A boolean, or nil.
-- @function boolean
function checks.boolean(name, argument, value)
  if value ~= nil and type(value) ~= "boolean" then fail(name, argument, "true or false", value) end
  return value
end

--- A string.
-- @function string
function checks.string(name, argument, value)
  if type(value) ~= "string" then fail(name, argument, "a string", value) end
  return value
end

--- A file name.
-- @function path
function checks.path(name, argument, value)
  if type(value) ~= "string" or value == "" or value:find("%z") then fail(name, argument, "the name of a file", value) end
  return value
end

--- A tensor that was not freed.
-- @function tensor
function checks.tensor(name, argument, value)
  if not is_tensor(value) then
    fail(name, argument, argument == "self" and "a tensor (methods are called with a colon)" or "a tensor", value)
  end
  if handle.is_freed(value) then fail(name, argument, "a live tensor", value) end
  return value
end

--- A tensor that may be written: none of its elements share memory.
-- @function output
function checks.output(name, argument, value)
  local h = checks.tensor(name, argument, value).handle
  for i = 0, h.ndim - 1 do
    if h.shape[i] > 1 and h.stride[i] == 0 then
      raise("%s: argument '%s': dimension %d is expanded, its elements share memory and cannot be written; clone it first",
        name, argument, i + 1)
    end
  end
  return value
end

--- A dimension, from 1, or from -1 for the last.
-- @treturn number as C counts them, from 0
-- @function dim
function checks.dim(name, argument, value, ndim)
  if ndim == 0 then raise("%s: argument '%s': a tensor of no dimensions has none to choose", name, argument) end
  local n = type(value) == "number" and value or nil
  if not n or n ~= math.floor(n) or n == 0 or n > ndim or n < -ndim then
    fail(name, argument, ("a dimension, 1 to %d or -%d to -1"):format(ndim, ndim), value)
  end
  return n > 0 and n - 1 or ndim + n
end

--- An index into a dimension of some size, from 1, or from -1 for the last.
-- @treturn number as C counts them, from 0
-- @function index
function checks.index(name, argument, value, size)
  local n = value
  if ffi.istype(int64, n) then n = tonumber(n) end
  if type(n) ~= "number" or n ~= math.floor(n) or n == 0 or n > size or n < -size then
    fail(name, argument, ("an index, 1 to %d or -%d to -1"):format(size, size), value)
  end
  return n > 0 and n - 1 or size + n
end

local function is_sequence(value)
  local n = 0
  for _ in pairs(value) do n = n + 1 end
  return n == #value
end

checks.is_sequence = is_sequence

--- A table of sizes.
-- @tparam[opt] number free a size that stands for something else, such as -1
-- @treturn table a copy, of Lua numbers
-- @function shape
function checks.shape(name, argument, value, free)
  if type(value) ~= "table" then fail(name, argument, "a table of sizes such as {2, 3}", value) end
  if not is_sequence(value) then
    raise("%s: argument '%s': expected a list of sizes such as {2, 3}, got a table with other keys", name, argument)
  end
  if #value > MAX_DIMS then
    raise("%s: argument '%s': expected at most %d dimensions, got %d", name, argument, MAX_DIMS, #value)
  end
  local sizes, count = {}, 1
  for i = 1, #value do
    local n = value[i]
    if ffi.istype(int64, n) then n = tonumber(n) end
    local whole = type(n) == "number" and n == math.floor(n) and n < EXACT
    if not (whole and (n > 0 or n == free)) then
      fail(name, argument, ("a positive whole number%s at [%d]"):format(free and " or " .. free or "", i), value[i])
    end
    sizes[i] = n
    count = count * math.max(n, 1)
  end
  if count >= EXACT then raise("%s: argument '%s': %s has too many elements", name, argument, shape_text(sizes)) end
  return sizes
end

--- A data type by name, or the default where nil.
-- @treturn table a row of cuflash.dtype
-- @function dtype
function checks.dtype(name, argument, value, default)
  if value == nil then return default end
  local row = type(value) == "string" and dtype.by_name[value:lower()]
  if row then return row end
  local hint = type(value) == "string" and errors.suggest(value, dtype.by_name) or ""
  return raise("%s: argument '%s': expected 'float32', 'float16', 'bfloat16' or 'float64', got %s%s", name, argument,
    describe(value), hint)
end

--- A device by name, or the default where nil; raises the library's reason where it is not available.
-- @treturn number as C counts them
-- @function device
function checks.device(name, argument, value, default)
  if value == nil then return default end
  local device = type(value) == "string" and dtype.parse_device(value)
  if not device then fail(name, argument, "'cpu', 'cuda' or 'cuda:N'", value) end
  native.call(name, C.cuflash_device_check, device)
  return device
end

--- A CUDA device by name, or the first where nil; raises the library's reason where it is not available.
-- @treturn number as C counts them
-- @function cuda_device
function checks.cuda_device(name, argument, value)
  local device = type(value) == "string" and dtype.parse_device(value) or value == nil and 0
  if not device or device == C.CUFLASH_CPU then fail(name, argument, "'cuda' or 'cuda:N'", value) end
  native.call(name, C.cuflash_device_check, device)
  return device
end

-- " (it takes 'a' and 'b')"
local function listed(known)
  local names = {}
  for name in pairs(known) do names[#names + 1] = ("'%s'"):format(name) end
  if #names == 0 then return " (it takes none)" end
  table.sort(names)
  local last = table.remove(names)
  return (" (it takes %s%s)"):format(#names > 0 and table.concat(names, ", ") .. " and " or "", last)
end

--- A table of options; unknown ones are refused.
-- @tparam table known the names there are, as keys
-- @treturn table the options, or an empty table
-- @function options
function checks.options(name, value, known)
  if value == nil then return {} end
  if type(value) ~= "table" then fail(name, "options", "a table of options", value) end
  for key in pairs(value) do
    if not known[key] then
      if type(key) ~= "string" then
        raise("%s: expected options by name, such as {%s = ...}, got one at [%s]", name, (next(known)), tostring(key))
      end
      local suggestion = errors.suggest(key, known)
      raise("%s: unknown option '%s'%s", name, key, suggestion ~= "" and suggestion or listed(known))
    end
  end
  return value
end

return checks
