--- Tensors over memory that is already there.
-- @module cuflash.borrow

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"

local borrow = {}

local C = native.C
local raise = errors.raise

-- The element type of a pointer or array as tostring shows it, "cdata<float *>" -> "float"; nil for a lightuserdata.
local function element_of(pointer)
  local text = type(pointer) == "cdata" and tostring(pointer):match("^cdata<(.-)>")
  return text and text:gsub("const ", ""):match("^(.-)%s*[%*%[]") or nil
end

local fixed = { float = dtype.float32, double = dtype.float64 } -- these can be nothing else

-- How many bytes of memory a view of those sizes and strides spans.
local function span(sizes, strides, kind)
  local last, stride = 0, 1
  for i = #sizes, 1, -1 do
    last = last + (sizes[i] - 1) * (strides and strides[i] or stride)
    stride = stride * sizes[i]
  end
  return (last + 1) * kind.size
end

local function check_strides(name, value, ndim)
  if type(value) ~= "table" or not checks.is_sequence(value) or #value ~= ndim then
    checks.fail(name, "strides", ("a table of %d strides"):format(ndim), value)
  end
  local strides = {}
  for i = 1, ndim do strides[i] = checks.integer(name, "strides", value[i], 0, 2 ^ 53) end
  return strides
end

--- A tensor over memory of the caller's: an FFI array or pointer, or a lightuserdata. Nothing is copied. An FFI array is
-- kept alive by the tensor and its views; what a mere pointer points to must outlive them.
-- @tparam cdata pointer
-- @tparam {number,...} shape
-- @tparam[opt] table options dtype (known for float and double), strides in elements (row-major without), device
-- @treturn Tensor
-- @function from_pointer
function borrow.from_pointer(pointer, shape, options)
  local name = "from_pointer"
  local element = element_of(pointer)
  if type(pointer) ~= "userdata" and not element or handle.is_tensor(pointer) then
    checks.fail(name, "pointer", "a pointer or an FFI array", pointer)
  end
  local ok, address = pcall(ffi.cast, "void *", pointer)
  if not ok then checks.fail(name, "pointer", "a pointer or an FFI array", pointer) end
  if address == nil then raise("from_pointer: argument 'pointer': expected memory, got NULL") end

  local sizes = checks.shape(name, "shape", shape)
  options = checks.options(name, options, { dtype = true, strides = true, device = true })
  local known = fixed[element]
  local kind = checks.dtype(name, "dtype", options.dtype, known)
  if not kind then
    raise("from_pointer: argument 'dtype': needed, as %s does not tell it", checks.describe(pointer))
  elseif known and known ~= kind then
    raise("from_pointer: argument 'dtype': expected '%s' for %s, got '%s'; cast the pointer if that is what you mean",
      known.name, checks.describe(pointer), kind.name)
  end
  local device = checks.device(name, "device", options.device, C.CUFLASH_CPU)
  local strides = options.strides ~= nil and check_strides(name, options.strides, #sizes) or nil
  local is_array = type(pointer) == "cdata" and tostring(pointer):find("^cdata<[^>]*%[") ~= nil
  if is_array and span(sizes, strides, kind) > ffi.sizeof(pointer) then
    raise("from_pointer: argument 'shape': %s of %s needs %.0f bytes, the array has %d", handle.shape_text(sizes),
      kind.name, span(sizes, strides, kind), ffi.sizeof(pointer))
  end

  local c_sizes, c_strides = ffi.new("int64_t[?]", #sizes + 1), strides and ffi.new("int64_t[?]", #sizes + 1)
  for i = 1, #sizes do
    c_sizes[i - 1] = sizes[i]
    if strides then c_strides[i - 1] = strides[i] end
  end
  local tensor = handle.type()
  native.call(name, C.cuflash_tensor_borrow, tensor, address, kind.code, device, #sizes, c_sizes, c_strides)
  if type(pointer) == "cdata" then handle.anchor(tensor, pointer) end
  return tensor
end

return borrow
