--- The tensor type: its methods and operators, put together.
-- @module cuflash.tensor

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"
local views = require "cuflash.views"
local copies = require "cuflash.copies"
local index = require "cuflash.index"
local arithmetic = require "cuflash.arithmetic"
local format = require "cuflash.format"

local C = native.C

local methods = {}

local shape_metatable = { __tostring = handle.shape_text }

--- The sizes, as a table that prints as [2 x 8 x 128 x 64].
-- @treturn {number,...}
-- @function tensor:shape
function methods:shape()
  checks.tensor("shape", "self", self)
  return setmetatable(handle.sizes(self), shape_metatable)
end

--- The size of one dimension.
-- @tparam number dim from 1, or from -1 for the last
-- @treturn number
-- @function tensor:size
function methods:size(dim)
  local h = checks.tensor("size", "self", self).handle
  return tonumber(h.shape[checks.dim("size", "dim", dim, h.ndim)])
end

--- The number of dimensions.
-- @treturn number
-- @function tensor:dim
function methods:dim()
  return checks.tensor("dim", "self", self).handle.ndim
end

--- The number of elements.
-- @treturn number
-- @function tensor:numel
function methods:numel()
  return tonumber(C.cuflash_tensor_numel(checks.tensor("numel", "self", self).handle))
end

--- The distance between neighbours of a dimension, in elements.
-- @tparam number dim from 1, or from -1 for the last
-- @treturn number
-- @function tensor:stride
function methods:stride(dim)
  local h = checks.tensor("stride", "self", self).handle
  return tonumber(h.stride[checks.dim("stride", "dim", dim, h.ndim)])
end

--- Whether the elements lie row-major without gaps.
-- @treturn boolean
-- @function tensor:is_contiguous
function methods:is_contiguous()
  return C.cuflash_tensor_is_contiguous(checks.tensor("is_contiguous", "self", self).handle)
end

--- A pointer to the first element: float *, double *, or uint16_t * for float16 and bfloat16; on a CUDA device a void *, which
-- only the device can read. It does not keep the tensor alive.
-- @treturn cdata
-- @function tensor:data
function methods:data()
  local h = checks.tensor("data", "self", self).handle
  if h.device ~= C.CUFLASH_CPU then return h.data end
  return ffi.cast(dtype.of(self).pointer, h.data)
end

--- Gives the memory back now rather than when the collector runs; views keep it alive. Freeing twice is harmless, any
-- other use of a freed tensor raises.
-- @function tensor:free
function methods:free()
  if not handle.is_tensor(self) then checks.tensor("free", "self", self) end
  C.cuflash_tensor_release(self.handle)
  handle.anchor(self, nil)
end

for _, source in ipairs { views, copies.methods, arithmetic.methods } do
  for name, method in pairs(source) do methods[name] = method end
end

local properties = {}

function properties.dtype(self)
  return dtype.of(checks.tensor("dtype", "self", self)).name
end

function properties.device(self)
  return dtype.device_name(checks.tensor("device", "self", self).handle.device)
end

local names = {}
for name in pairs(methods) do names[name] = true end
for name in pairs(properties) do names[name] = true end

local metatable = {
  __gc = function(self) C.cuflash_tensor_release(self.handle) end,
  __tostring = format.tensor,
  __concat = function(a, b) return tostring(a) .. tostring(b) end,
  __eq = rawequal,
}

function metatable.__index(self, key)
  if type(key) == "string" then
    local method = methods[key]
    if method then return method end
    local property = properties[key]
    if property then return property(self) end
    return errors.raise("tensor has no field '%s'%s", key, errors.suggest(key, names))
  end
  return index.get(self, key)
end

function metatable.__newindex(self, key, value)
  if type(key) == "string" then
    errors.raise("tensor has no field '%s' that can be set", key)
  end
  index.set(self, key, value)
end

function metatable.__len(self)
  local h = checks.tensor("#", "self", self).handle
  if h.ndim == 0 then errors.raise("#: a tensor of no dimensions has no length") end
  return tonumber(h.shape[0])
end

local function unordered()
  errors.raise("tensors have no order; compare their elements, or see cf.all_close and cf.equal")
end
metatable.__lt, metatable.__le = unordered, unordered

function metatable.__pow() errors.raise("tensors have no operator ^; multiply, or use :exp() and :log()") end
function metatable.__mod() errors.raise("tensors have no operator %") end
function metatable.__call() errors.raise("a tensor is not a function; index it with t[1] or t[{1, {}, {1, 8}}]") end

for name, method in pairs(arithmetic.metamethods) do metatable[name] = method end

ffi.metatype(handle.type, metatable)

return { methods = methods, properties = properties }
