--- Element by element: + - * / with broadcasting, a few functions, and reductions.
--
-- Results are computed in float64 and rounded once. Where two dtypes meet, float64 wins, and otherwise the result is
-- float32; a Lua number takes the tensor's dtype.
-- @module cuflash.arithmetic

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"
local memory = require "cuflash.memory"
local copies = require "cuflash.copies"

local arithmetic = { methods = {}, metamethods = {} }

local C = native.C
local methods = arithmetic.methods
local is_tensor, sizes_of, shape_text = handle.is_tensor, handle.sizes, handle.shape_text

-- The shape two tensors broadcast to.
local function broadcast(name, a, b)
  local left, right, sizes = sizes_of(a), sizes_of(b), {}
  local ndim = math.max(#left, #right)
  for i = 1, ndim do
    local m, n = left[i - ndim + #left] or 1, right[i - ndim + #right] or 1
    if m ~= n and m ~= 1 and n ~= 1 then
      errors.raise("%s: shapes %s and %s do not broadcast", name, shape_text(left), shape_text(right))
    end
    sizes[i] = math.max(m, n)
  end
  return sizes
end

local function same_device(name, argument, tensor, device)
  if tensor.handle.device ~= device then
    errors.raise("%s: argument '%s': expected a tensor on %s, got one on %s", name, argument, dtype.device_name(device),
      dtype.device_name(tensor.handle.device))
  end
end

-- a op b into a new tensor; either may be a number.
local function binary(name, op, a, b)
  if not is_tensor(a) and type(a) ~= "number" then checks.fail(name, "a", "a tensor or a number", a) end
  if not is_tensor(b) and type(b) ~= "number" then checks.fail(name, "b", "a tensor or a number", b) end
  if type(a) == "number" and type(b) == "number" then checks.fail(name, "b", "a tensor, as a is a number", b) end
  local reversed = type(a) == "number"
  if reversed then a, b = b, a end
  checks.tensor(name, reversed and "b" or "a", a)
  if type(b) == "number" then
    local out = memory.empty(name, dtype.of(a), a.handle.device, sizes_of(a))
    native.call(name, C.cuflash_tensor_binary_scalar, op, out, a, b, reversed)
    return out
  end
  checks.tensor(name, "b", b)
  same_device(name, "b", b, a.handle.device)
  local kind = dtype.promote(dtype.of(a), dtype.of(b))
  local out = memory.empty(name, kind, a.handle.device, broadcast(name, a, b))
  native.call(name, C.cuflash_tensor_binary, op, out, a, b)
  return out
end

-- self = self op other.
local function binary_in_place(name, op, self, other)
  checks.output(name, "self", self)
  if type(other) == "number" then
    native.call(name, C.cuflash_tensor_binary_scalar, op, self, self, other, false)
    return self
  end
  if not is_tensor(other) then checks.fail(name, "other", "a tensor or a number", other) end
  checks.tensor(name, "other", other)
  same_device(name, "other", other, self.handle.device)
  copies.check_broadcast(name, "other", other, sizes_of(self))
  native.call(name, C.cuflash_tensor_binary, op, self, self, other)
  return self
end

local function unary(name, op, self)
  checks.tensor(name, "self", self)
  local out = memory.empty(name, dtype.of(self), self.handle.device, sizes_of(self))
  native.call(name, C.cuflash_tensor_unary, op, out, self)
  return out
end

local function unary_in_place(name, op, self)
  checks.output(name, "self", self)
  native.call(name, C.cuflash_tensor_unary, op, self, self)
  return self
end

--- Adds in place: self = self + other.
-- @tparam Tensor|number other of a shape that broadcasts to that of self
-- @treturn Tensor self
-- @function tensor:add_

--- Subtracts in place: self = self - other.
-- @tparam Tensor|number other of a shape that broadcasts to that of self
-- @treturn Tensor self
-- @function tensor:sub_

--- Multiplies in place: self = self * other.
-- @tparam Tensor|number other of a shape that broadcasts to that of self
-- @treturn Tensor self
-- @function tensor:mul_

--- Divides in place: self = self / other.
-- @tparam Tensor|number other of a shape that broadcasts to that of self
-- @treturn Tensor self
-- @function tensor:div_
for _, name in ipairs { "add", "sub", "mul", "div" } do
  local op = C["CUFLASH_" .. name:upper()]
  arithmetic.metamethods["__" .. name] = function(a, b) return (binary(name, op, a, b)) end
  methods[name .. "_"] = function(self, other) return (binary_in_place(name .. "_", op, self, other)) end
end

--- The larger of two, element by element; NaN if either is. Also cf.maximum(a, b), where one may be a number.
-- @tparam Tensor|number other
-- @treturn Tensor
-- @function tensor:maximum
function methods.maximum(a, b) return (binary("maximum", C.CUFLASH_MAXIMUM, a, b)) end

--- The smaller of two, element by element; NaN if either is. Also cf.minimum(a, b), where one may be a number.
-- @tparam Tensor|number other
-- @treturn Tensor
-- @function tensor:minimum
function methods.minimum(a, b) return (binary("minimum", C.CUFLASH_MINIMUM, a, b)) end

function arithmetic.metamethods.__unm(a) return (unary("unm", C.CUFLASH_NEG, a)) end

--- Absolute values; t:abs_() works in place.
-- @treturn Tensor
-- @function tensor:abs

--- The exponential; t:exp_() works in place.
-- @treturn Tensor
-- @function tensor:exp

--- The natural logarithm; t:log_() works in place.
-- @treturn Tensor
-- @function tensor:log

--- The square root; t:sqrt_() works in place.
-- @treturn Tensor
-- @function tensor:sqrt
for _, name in ipairs { "abs", "exp", "log", "sqrt" } do
  local op = C["CUFLASH_" .. name:upper()]
  methods[name] = function(self) return (unary(name, op, self)) end
  methods[name .. "_"] = function(self) return (unary_in_place(name .. "_", op, self)) end
end

local number = ffi.new "double[1]"

local function reduce(name, op, self, dim, options)
  local h = checks.tensor(name, "self", self).handle
  if dim == nil then
    checks.options(name, options, {}) -- keepdim needs a dim
    native.call(name, C.cuflash_tensor_reduce_all, op, self, number)
    return number[0]
  end
  dim = checks.dim(name, "dim", dim, h.ndim)
  options = checks.options(name, options, { keepdim = true })
  local keepdim = checks.boolean(name, "keepdim", options.keepdim)
  local sizes = sizes_of(self)
  table.remove(sizes, dim + 1)
  local out = memory.empty(name, dtype.of(self), h.device, sizes)
  native.call(name, C.cuflash_tensor_reduce, op, out, self, dim)
  if keepdim then
    table.insert(sizes, dim + 1, 1)
    native.call(name, C.cuflash_tensor_view, out, out, #sizes, memory.c_shape(sizes))
  end
  return out
end

--- The sum: of all elements as a Lua number, or over one dimension as a tensor.
-- @tparam[opt] number dim
-- @tparam[opt] table options keepdim = true leaves the dimension, with size 1
-- @treturn number|Tensor
-- @function tensor:sum

--- The mean: of all elements as a Lua number, or over one dimension as a tensor.
-- @tparam[opt] number dim
-- @tparam[opt] table options keepdim = true leaves the dimension, with size 1
-- @treturn number|Tensor
-- @function tensor:mean

--- The largest element, NaN if any is: of all as a Lua number, or over one dimension as a tensor.
-- @tparam[opt] number dim
-- @tparam[opt] table options keepdim = true leaves the dimension, with size 1
-- @treturn number|Tensor
-- @function tensor:max

--- The smallest element, NaN if any is: of all as a Lua number, or over one dimension as a tensor.
-- @tparam[opt] number dim
-- @tparam[opt] table options keepdim = true leaves the dimension, with size 1
-- @treturn number|Tensor
-- @function tensor:min
for _, name in ipairs { "sum", "mean", "max", "min" } do
  local op = C["CUFLASH_" .. name:upper()]
  methods[name] = function(self, dim, options) return (reduce(name, op, self, dim, options)) end
end

return arithmetic
