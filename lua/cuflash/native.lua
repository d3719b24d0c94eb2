--- Calls into the library: statuses become errors, and memory is collected before a call fails for want of it.
-- @module cuflash.native

local ffi = require "ffi"
local C = require("cuflash.library").C
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"

local native = { C = C }

local SUCCESS = tonumber(C.CUFLASH_SUCCESS)
local OUT_OF_MEMORY = tonumber(C.CUFLASH_OUT_OF_MEMORY)

local tensor_type = handle.type

-- The arguments as C takes them: tensors become their C structs. The tensors themselves stay referenced by
-- the caller's varargs, so that a collection cannot take them away during the call.
local function unwrap(n, first, ...)
  if n == 0 then return end
  if ffi.istype(tensor_type, first) then first = first.handle end
  if n == 1 then return first end
  return first, unwrap(n - 1, ...)
end

--- The sentence of the last failed call, under the name the Lua user knows the function by.
-- @function last_error
function native.last_error(name)
  local message = ffi.string(C.cuflash_last_error())
  return name .. ": " .. (message:match("^[%w_]+: (.*)$") or message)
end

--- Calls a C function and returns its status; out of memory, it collects garbage and tries once more.
-- @tparam cdata f the function
-- @param ... its arguments, tensors among them
-- @treturn number a cuflash_status
-- @function try
function native.try(f, ...)
  local n = select("#", ...)
  local status = tonumber(f(unwrap(n, ...)))
  if status == OUT_OF_MEMORY then
    collectgarbage()
    collectgarbage()
    status = tonumber(f(unwrap(n, ...)))
  end
  return status
end

local try = native.try

--- Raises the sentence of the last failed call.
-- @function fail
function native.fail(name)
  errors.raise("%s", native.last_error(name))
end

--- Calls a C function and raises what it reports at the user's line.
-- @tparam string name what the user called
-- @tparam cdata f the C function
-- @param ... its arguments, tensors among them
-- @function call
function native.call(name, f, ...)
  if try(f, ...) ~= SUCCESS then native.fail(name) end
end

return native
