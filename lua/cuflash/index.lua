--- Reading and assigning with brackets: t[1], t[{1, {}, {1, 64}}], t[{1, 1, 1, 1}] = 0.
--
-- A number selects from the first dimension. A table has an entry a dimension, from the first on: a number
-- selects and drops the dimension, {first, last} keeps that range (both inclusive), {} keeps all; dimensions
-- without an entry are kept whole. Negative numbers count from the end. Where every dimension is selected the
-- result is a Lua number, otherwise a view.
-- @module cuflash.index

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local copies = require "cuflash.copies"
local create = require "cuflash.create"

local index = {}

local C = native.C
local raise = errors.raise

local position = ffi.new("int64_t[?]", tonumber(C.CUFLASH_MAX_DIMS))
local value_buffer = ffi.new "double[1]"

-- One {first, last} of a dimension, as C's start and length.
local function range(name, entry, dim, size)
  if not checks.is_sequence(entry) or (#entry ~= 0 and #entry ~= 2) then
    raise("%s: dimension %d: expected a number, {first, last} or {}, got a table of %d", name, dim, #entry)
  end
  if #entry == 0 then return 0, size end
  local first = checks.index(name, "first of dimension " .. dim, entry[1], size)
  local last = checks.index(name, "last of dimension " .. dim, entry[2], size)
  if last < first then
    raise("%s: dimension %d: expected first <= last, got {%d, %d} of %d", name, dim, entry[1], entry[2], size)
  end
  return first, last - first + 1
end

-- What a key means: nil and the position filled in where it is one element, otherwise a view.
local function resolve(name, tensor, key)
  local h = tensor.handle
  local ndim = h.ndim
  local entries = key
  if key == nil then raise("%s: expected a number or a table, got nil", name) end
  if type(key) ~= "table" then
    if ndim == 0 then raise("%s: a tensor of no dimensions cannot be indexed; use :item()", name) end
    entries = { key }
  end
  if not checks.is_sequence(entries) then raise("%s: expected a list of entries, got a table with gaps or other keys", name) end
  if #entries > ndim then raise("%s: expected at most %d entries (one a dimension), got %d", name, ndim, #entries) end
  local selected = 0
  for dim = 1, #entries do
    if type(entries[dim]) ~= "table" then
      position[dim - 1] = checks.index(name, "dimension " .. dim, entries[dim], tonumber(h.shape[dim - 1]))
      selected = selected + 1
    end
  end
  if selected == ndim then return nil end
  local view, at = handle.type(), 0
  native.call(name, C.cuflash_tensor_alias, view, tensor)
  for dim = 1, #entries do
    if type(entries[dim]) == "table" then
      local start, length = range(name, entries[dim], dim, tonumber(h.shape[dim - 1]))
      native.call(name, C.cuflash_tensor_narrow, view, view, at, start, length)
      at = at + 1
    else
      native.call(name, C.cuflash_tensor_select, view, view, at, position[dim - 1])
    end
  end
  handle.share_anchor(view, tensor)
  return view
end

--- The value of t[key]: a number or a view.
-- @function get
function index.get(tensor, key)
  checks.tensor("index", "tensor", tensor)
  local view = resolve("index", tensor, key)
  if view then return view end
  native.call("index", C.cuflash_tensor_get, tensor, position, value_buffer)
  return value_buffer[0]
end

--- Does t[key] = value, where value is a number, a tensor or nested tables of numbers.
-- @function set
function index.set(tensor, key, value)
  checks.output("index", "tensor", tensor)
  local temporary
  if type(value) == "table" then
    temporary = create.from_table("index", value)
    value = temporary
  elseif not handle.is_tensor(value) and type(value) ~= "number" then
    checks.fail("index", "value", "a number, a tensor or nested tables of numbers", value)
  end
  local view = resolve("index", tensor, key)
  if type(value) == "number" then
    if view then
      native.call("index", C.cuflash_tensor_fill, view, value)
    else
      native.call("index", C.cuflash_tensor_set, tensor, position, value)
    end
  else
    checks.tensor("index", "value", value)
    copies.check_broadcast("index", "value", value, view and handle.sizes(view) or {})
    if view then
      native.call("index", C.cuflash_tensor_copy, view, value)
    else
      value_buffer[0] = value:item()
      native.call("index", C.cuflash_tensor_set, tensor, position, value_buffer[0])
    end
  end
  if view then view:free() end
  if temporary then temporary:free() end
end

return index
