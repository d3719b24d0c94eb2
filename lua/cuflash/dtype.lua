--- The names of data types and devices.
-- @module cuflash.dtype

local ffi = require "ffi"
local C = require("cuflash.library").C

local dtype = {}

-- One row a type: its name, what else it is called, and what data() points to.
local rows = {
  { name = "float32", aliases = { "f32", "float" }, pointer = "float *" },
  { name = "float16", aliases = { "f16", "half" }, pointer = "uint16_t *" },
  { name = "bfloat16", aliases = { "bf16" }, pointer = "uint16_t *" },
  { name = "float64", aliases = { "f64", "double" }, pointer = "double *" },
}

dtype.by_name = {} -- name or alias -> row
dtype.by_code = {} -- cuflash_dtype -> row

for _, row in ipairs(rows) do
  row.code = tonumber(C["CUFLASH_" .. row.name:upper()])
  row.size = tonumber(C.cuflash_dtype_size(row.code))
  row.pointer = ffi.typeof(row.pointer)
  dtype.by_code[row.code] = row
  dtype.by_name[row.name] = row
  for _, alias in ipairs(row.aliases) do dtype.by_name[alias] = row end
end

dtype.float32 = dtype.by_name.float32
dtype.float64 = dtype.by_name.float64

--- The row of a tensor's type.
-- @function of
function dtype.of(tensor)
  return dtype.by_code[tonumber(tensor.handle.dtype)]
end

--- The type of the result where two types meet: the same one, float64 if either is, otherwise float32.
-- @function promote
function dtype.promote(a, b)
  if a == b then return a end
  if a == dtype.float64 or b == dtype.float64 then return dtype.float64 end
  return dtype.float32
end

--- The name of a device: "cpu", "cuda:0".
-- @tparam int device as C counts them
-- @function device_name
function dtype.device_name(device)
  return device == C.CUFLASH_CPU and "cpu" or ("cuda:%d"):format(device)
end

--- The device of a name, or nil where the name is none.
-- @tparam string name "cpu", "cuda" (the same as "cuda:0") or "cuda:N"
-- @function parse_device
function dtype.parse_device(name)
  if name == "cpu" then return C.CUFLASH_CPU end
  if name == "cuda" then return 0 end
  local ordinal = tonumber(name:match("^cuda:(%d+)$"))
  return ordinal and ordinal < 2 ^ 31 and ordinal or nil
end

return dtype
