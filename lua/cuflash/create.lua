--- New tensors. Shapes are tables of sizes; the options are dtype ("float32") and device ("cpu").
-- @module cuflash.create

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"
local memory = require "cuflash.memory"

local create = {}

local C = native.C
local raise = errors.raise

local MAX_DIMS = tonumber(C.CUFLASH_MAX_DIMS)
local OPTIONS = { dtype = true, device = true }

-- A tensor of undefined values, as the options say.
local function make(name, shape, options, like)
  local sizes = checks.shape(name, "shape", shape)
  options = checks.options(name, options, OPTIONS)
  local kind = checks.dtype(name, "dtype", options.dtype, like and dtype.of(like) or dtype.float32)
  local device = checks.device(name, "device", options.device, like and like.handle.device or C.CUFLASH_CPU)
  return memory.empty(name, kind, device, sizes)
end

local function make_like(name, tensor, options)
  checks.tensor(name, "tensor", tensor)
  return make(name, handle.sizes(tensor), options, tensor)
end

local function filled(name, tensor, value)
  native.call(name, C.cuflash_tensor_fill, tensor, value)
  return tensor
end

--- A tensor of undefined values.
-- @tparam {number,...} shape
-- @tparam[opt] table options dtype, device
-- @treturn Tensor
-- @function empty
function create.empty(shape, options)
  return (make("empty", shape, options))
end

--- A tensor of zeros.
-- @tparam {number,...} shape
-- @tparam[opt] table options dtype, device
-- @treturn Tensor
-- @function zeros
function create.zeros(shape, options)
  return filled("zeros", make("zeros", shape, options), 0)
end

--- A tensor of ones.
-- @tparam {number,...} shape
-- @tparam[opt] table options dtype, device
-- @treturn Tensor
-- @function ones
function create.ones(shape, options)
  return filled("ones", make("ones", shape, options), 1)
end

--- A tensor of one value.
-- @tparam {number,...} shape
-- @tparam number value
-- @tparam[opt] table options dtype, device
-- @treturn Tensor
-- @function full
function create.full(shape, value, options)
  value = checks.number("full", "value", value)
  return filled("full", make("full", shape, options), value)
end

--- A tensor of undefined values with the shape of another, and its dtype and device unless the options say otherwise.
-- @tparam Tensor tensor
-- @tparam[opt] table options dtype, device
-- @treturn Tensor
-- @function empty_like
function create.empty_like(tensor, options)
  return (make_like("empty_like", tensor, options))
end

--- A tensor of zeros with the shape of another, and its dtype and device unless the options say otherwise.
-- @tparam Tensor tensor
-- @tparam[opt] table options dtype, device
-- @treturn Tensor
-- @function zeros_like
function create.zeros_like(tensor, options)
  return filled("zeros_like", make_like("zeros_like", tensor, options), 0)
end

--- A tensor of ones with the shape of another, and its dtype and device unless the options say otherwise.
-- @tparam Tensor tensor
-- @tparam[opt] table options dtype, device
-- @treturn Tensor
-- @function ones_like
function create.ones_like(tensor, options)
  return filled("ones_like", make_like("ones_like", tensor, options), 1)
end

--- The numbers that `for i = first, last, step` visits, both ends inclusive; cf.arange(n) is 1 ... n.
-- @tparam number first
-- @tparam number last
-- @tparam[opt=1] number step
-- @tparam[opt] table options dtype, device
-- @treturn Tensor of one dimension
-- @function arange
function create.arange(first, last, step, options)
  if type(step) == "table" then step, options = nil, step end
  if type(last) == "table" then last, options = nil, last end
  local argument = last == nil and "last" or "first"
  if last == nil then first, last = 1, first end
  step = step == nil and 1 or step
  first = checks.finite("arange", argument, first)
  last = checks.finite("arange", "last", last)
  step = checks.finite("arange", "step", step)
  if step == 0 then raise("arange: argument 'step': expected a number other than 0, got 0") end
  -- a rounding error in the division must not lose the last number
  local count = math.floor((last - first) / step * (1 + 1e-15) + 1e-9) + 1
  if not (count >= 1) then raise("arange: nothing lies from %.14g to %.14g in steps of %.14g", first, last, step) end
  if count >= 2 ^ 53 then raise("arange: %.14g to %.14g in steps of %.14g are too many numbers", first, last, step) end
  local tensor = make("arange", { count }, options)
  native.call("arange", C.cuflash_tensor_arange, tensor, first, step)
  return tensor
end

-- The sizes of nested tables, by their first elements.
local function sizes_of(name, values)
  local sizes, level = {}, values
  while type(level) == "table" do
    if #sizes == MAX_DIMS then
      raise("%s: argument 'values': tables are nested deeper than %d dimensions", name, MAX_DIMS)
    end
    if #level == 0 then raise("%s: argument 'values': expected numbers, got an empty table", name) end
    sizes[#sizes + 1] = #level
    level = level[1]
  end
  return sizes
end

-- Writes nested tables of those sizes to memory, in row-major order.
local function write(name, values, sizes, data)
  local at, path = 0, {}
  local function place() return #path == 0 and "" or " at [" .. table.concat(path, "][") .. "]" end
  local function visit(level, dim)
    if dim > #sizes then
      if type(level) ~= "number" then
        raise("%s: argument 'values': expected a number%s, got %s", name, place(), checks.describe(level))
      end
      data[at] = level
      at = at + 1
      return
    end
    if type(level) ~= "table" then
      raise("%s: argument 'values': expected a table of %d%s, got %s", name, sizes[dim], place(), checks.describe(level))
    end
    if #level ~= sizes[dim] or not checks.is_sequence(level) then
      raise("%s: argument 'values': expected a list of %d%s, got one of %d%s", name, sizes[dim], place(), #level,
        checks.is_sequence(level) and "" or " with other keys")
    end
    for i = 1, #level do
      path[dim] = i
      visit(level[i], dim + 1)
      path[dim] = nil
    end
  end
  visit(values, 1)
end

--- A float64 tensor on the CPU from nested tables.
-- @function from_table
-- @local
function create.from_table(name, values)
  local sizes = sizes_of(name, values)
  local tensor = memory.empty(name, dtype.float64, C.CUFLASH_CPU, sizes)
  local ok, message = pcall(write, name, values, sizes, ffi.cast("double *", tensor.handle.data))
  if not ok then
    tensor:free()
    error(message, 0)
  end
  return tensor
end

--- A tensor of given values: cf.tensor({{1, 2}, {3, 4}}), cf.tensor(3.5).
-- @tparam table|number values nested tables of numbers, all of a level of one length
-- @tparam[opt] table options dtype, device
-- @treturn Tensor
-- @function tensor
function create.tensor(values, options)
  if handle.is_tensor(values) then raise("tensor: argument 'values': expected a table, got a tensor; use t:clone()") end
  if type(values) ~= "table" and type(values) ~= "number" then
    checks.fail("tensor", "values", "a number or nested tables of numbers", values)
  end
  options = checks.options("tensor", options, OPTIONS)
  local kind = checks.dtype("tensor", "dtype", options.dtype, dtype.float32)
  local device = checks.device("tensor", "device", options.device, C.CUFLASH_CPU)
  local source = create.from_table("tensor", values)
  if kind == dtype.float64 and device == C.CUFLASH_CPU then return source end
  local tensor = memory.empty("tensor", kind, device, handle.sizes(source))
  native.call("tensor", C.cuflash_tensor_copy, tensor, source)
  source:free()
  return tensor
end

create.make, create.make_like = make, make_like

return create
