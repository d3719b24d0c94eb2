--- Copies and conversions: between tensors, dtypes, devices and Lua values.
-- @module cuflash.copies

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"
local memory = require "cuflash.memory"

local copies = {}

local C = native.C
local sizes_of, shape_text = handle.sizes, handle.shape_text

-- A row-major copy, of another dtype or on another device where given.
local function copy(name, source, kind, device)
  kind = kind or dtype.of(source)
  if device == nil then device = source.handle.device end
  local out = memory.empty(name, kind, device, sizes_of(source))
  native.call(name, C.cuflash_tensor_copy, out, source)
  return out
end

local function to(name, tensor, kind, device)
  if kind == dtype.of(tensor) and device == tensor.handle.device then return tensor end
  return copy(name, tensor, kind, device)
end

local methods = {}

--- A copy of its own memory, row-major.
-- @treturn Tensor
-- @function tensor:clone
function methods:clone()
  checks.tensor("clone", "self", self)
  return copy("clone", self)
end

--- The tensor itself if it is row-major without gaps, otherwise a copy that is.
-- @treturn Tensor
-- @function tensor:contiguous
function methods:contiguous()
  checks.tensor("contiguous", "self", self)
  if C.cuflash_tensor_is_contiguous(self.handle) then return self end
  return copy("contiguous", self)
end

--- Converts to another dtype or device: t:to("cpu"), t:to("float16"), t:to{dtype = "float32", device = "cuda:0"}.
-- Returns the tensor itself where nothing changes.
-- @tparam string|table target a device, a dtype, or a table with the fields dtype and device
-- @treturn Tensor
-- @function tensor:to
function methods:to(target)
  checks.tensor("to", "self", self)
  local kind, device
  if type(target) == "string" then
    kind = dtype.by_name[target:lower()]
    if not kind then
      if not dtype.parse_device(target) then
        errors.raise("to: expected a device ('cpu', 'cuda', 'cuda:N') or a dtype, got %s%s", checks.describe(target),
          errors.suggest(target, dtype.by_name))
      end
      device = checks.device("to", "device", target)
    end
  else
    if target == nil then checks.fail("to", "target", "a device, a dtype or a table of both", target) end
    local options = checks.options("to", target, { dtype = true, device = true })
    kind = checks.dtype("to", "dtype", options.dtype)
    device = checks.device("to", "device", options.device)
  end
  return to("to", self, kind or dtype.of(self), device or self.handle.device)
end

--- A copy on the CPU, or the tensor itself if it is there.
-- @treturn Tensor
-- @function tensor:cpu
function methods:cpu()
  checks.tensor("cpu", "self", self)
  return to("cpu", self, dtype.of(self), C.CUFLASH_CPU)
end

--- A copy on a CUDA device, or the tensor itself if it is there.
-- @tparam[opt=0] number ordinal of the device, from 0 as CUDA counts them
-- @treturn Tensor
-- @function tensor:cuda
function methods:cuda(ordinal)
  checks.tensor("cuda", "self", self)
  ordinal = checks.integer("cuda", "ordinal", ordinal == nil and 0 or ordinal, 0, 2 ^ 31 - 1)
  return to("cuda", self, dtype.of(self), checks.device("cuda", "device", "cuda:" .. ordinal))
end

--- As float32.
-- @treturn Tensor
-- @function tensor:float

--- As float16.
-- @treturn Tensor
-- @function tensor:half

--- As bfloat16.
-- @treturn Tensor
-- @function tensor:bfloat16

--- As float64.
-- @treturn Tensor
-- @function tensor:double
for _, name in ipairs { "float", "half", "bfloat16", "double" } do
  methods[name] = function(self)
    checks.tensor(name, "self", self)
    return to(name, self, dtype.by_name[name], self.handle.device)
  end
end

--- Copies the values of another tensor into this one, converting dtype and device; the shape broadcasts.
-- @tparam Tensor source
-- @treturn Tensor self
-- @function tensor:copy_
function methods:copy_(source)
  checks.output("copy_", "self", self)
  checks.tensor("copy_", "source", source)
  copies.check_broadcast("copy_", "source", source, sizes_of(self))
  native.call("copy_", C.cuflash_tensor_copy, self, source)
  return self
end

--- Sets every element.
-- @tparam number value
-- @treturn Tensor self
-- @function tensor:fill_
function methods:fill_(value)
  checks.output("fill_", "self", self)
  value = checks.number("fill_", "value", value)
  native.call("fill_", C.cuflash_tensor_fill, self, value)
  return self
end

--- Sets every element to 0.
-- @treturn Tensor self
-- @function tensor:zero_
function methods:zero_()
  checks.output("zero_", "self", self)
  native.call("zero_", C.cuflash_tensor_fill, self, 0)
  return self
end

-- The values in row-major order as float64, and what holds that memory.
local function doubles(name, tensor)
  local source = to(name, tensor, dtype.float64, C.CUFLASH_CPU)
  if not C.cuflash_tensor_is_contiguous(source.handle) then source = copy(name, source) end
  return ffi.cast("const double *", source.handle.data), source
end

--- The values as nested Lua tables; a tensor of no dimensions gives a number.
-- @treturn table|number
-- @function tensor:totable
function methods:totable()
  checks.tensor("totable", "self", self)
  local values, holder = doubles("totable", self)
  local sizes, at = sizes_of(self), 0
  local function build(dim)
    local list = {}
    for i = 1, sizes[dim] do
      if dim == #sizes then
        list[i] = values[at]
        at = at + 1
      else
        list[i] = build(dim + 1)
      end
    end
    return list
  end
  local result = #sizes == 0 and values[0] or build(1)
  if not rawequal(holder, self) then holder:free() end
  return result
end

--- The value of a tensor of one element.
-- @treturn number
-- @function tensor:item
function methods:item()
  checks.tensor("item", "self", self)
  if C.cuflash_tensor_numel(self.handle) ~= 1 then
    errors.raise("item: expected a tensor of one element, got %s", checks.describe(self))
  end
  local values, holder = doubles("item", self)
  local result = values[0]
  if not rawequal(holder, self) then holder:free() end
  return result
end

--- Raises unless a tensor broadcasts to some sizes.
-- @function check_broadcast
-- @local
function copies.check_broadcast(name, argument, tensor, sizes)
  local own = sizes_of(tensor)
  local added = #sizes - #own
  local fits = added >= 0
  for i = 1, #own do fits = fits and (own[i] == 1 or own[i] == sizes[i + added]) end
  if not fits then
    errors.raise("%s: argument '%s': expected a shape that broadcasts to %s, got %s", name, argument, shape_text(sizes),
      shape_text(own))
  end
end

copies.copy, copies.to, copies.doubles = copy, to, doubles
copies.methods = methods

return copies
