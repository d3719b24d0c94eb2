--- NumPy's .npy files, versions 1.0 to 3.0.
--
-- Written: float32, float16 and float64, little-endian, C order. Read: those in either byte order and either memory order,
-- bfloat16 as ml_dtypes writes it ('<V2'), and by conversion booleans and integers (of up to 16 bits to float32, wider
-- ones to float64, which must hold them exactly). NumPy has no name for bfloat16, so saving it is refused.
-- @module cuflash.npy

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"
local memory = require "cuflash.memory"
local copies = require "cuflash.copies"
local files = require "cuflash.files"

local npy = {}

local C = native.C

local MAGIC = "\147NUMPY"
local DESCR = { float32 = "<f4", float16 = "<f2", float64 = "<f8" }
local FLOATS = { f2 = dtype.by_name.float16, f4 = dtype.float32, f8 = dtype.float64 }

-- What is read by conversion: the type in memory and the dtype that holds it.
local INTEGERS = {
  b1 = { type = "uint8_t", kind = dtype.float32 },
  i1 = { type = "int8_t", kind = dtype.float32 }, u1 = { type = "uint8_t", kind = dtype.float32 },
  i2 = { type = "int16_t", kind = dtype.float32 }, u2 = { type = "uint16_t", kind = dtype.float32 },
  i4 = { type = "int32_t", kind = dtype.float64 }, u4 = { type = "uint32_t", kind = dtype.float64 },
  i8 = { type = "int64_t", kind = dtype.float64, wide = true },
  u8 = { type = "uint64_t", kind = dtype.float64, wide = true },
}

--- Writes a tensor to a .npy file, whole or not at all.
-- @tparam string path
-- @tparam Tensor tensor float32, float16 or float64
-- @treturn boolean true; or nil and a message
-- @function save
function npy.save(path, tensor)
  checks.path("save", "path", path)
  checks.tensor("save", "tensor", tensor)
  local kind = dtype.of(tensor)
  local descr = DESCR[kind.name]
  if not descr then
    errors.raise("save: argument 'tensor': .npy has no %s; convert it with :float(), or use cf.safetensors.save", kind.name)
  end
  local sizes = handle.sizes(tensor)
  local shape = table.concat(sizes, ", ") .. (#sizes == 1 and "," or "")
  local header = ("{'descr': '%s', 'fortran_order': False, 'shape': (%s), }"):format(descr, shape)
  local padding = (-(#MAGIC + 4 + #header + 1)) % 64
  header = header .. (" "):rep(padding) .. "\n"

  local source = copies.to("save", tensor, kind, C.CUFLASH_CPU):contiguous()
  local bytes = source:numel() * kind.size
  local ok, message = files.replace(path, function(file)
    local length = string.char(#header % 256, math.floor(#header / 256))
    local written, why = file:write(MAGIC, "\1\0", length, header)
    if not written then return nil, why end
    return files.write(file, source.handle.data, bytes)
  end)
  if not rawequal(source, tensor) then source:free() end
  if ok then return true end
  return nil, message
end

-- Python's literal of the header: the fields descr, fortran_order and shape.
local function parse_header(text)
  local body = text:match("^%s*{(.*)}%s*$")
  if not body then return nil, "its header is not a dictionary" end
  local descr = body:match("['\"]descr['\"]%s*:%s*['\"]([^'\"]*)['\"]")
  if not descr then
    if body:find("['\"]descr['\"]%s*:%s*%[") then return nil, "it holds records (a structured dtype), not numbers" end
    return nil, "its header names no descr"
  end
  local order = body:match("['\"]fortran_order['\"]%s*:%s*(%a+)")
  if order ~= "True" and order ~= "False" then return nil, "its header does not say fortran_order" end
  local shape = body:match("['\"]shape['\"]%s*:%s*%(([%d%s,L]*)%)")
  if not shape then return nil, "its header names no shape" end
  local sizes, count = {}, 1
  for number in shape:gmatch("%d+") do
    sizes[#sizes + 1] = tonumber(number)
    count = count * sizes[#sizes]
  end
  if #sizes > tonumber(C.CUFLASH_MAX_DIMS) then
    return nil, ("it has %d dimensions, more than %d"):format(#sizes, tonumber(C.CUFLASH_MAX_DIMS))
  end
  if count == 0 then return nil, "it holds no elements: its shape is (" .. shape .. ")" end
  return { descr = descr, fortran = order == "True", sizes = sizes, count = count }
end

-- The dtype to read into and, for integers, how: by the descr.
local function find_type(descr)
  if descr == "<V2" then return { kind = dtype.by_name.bfloat16, size = 2 } end
  local order, code, width = descr:match("^([<>=|])(%a)(%d+)$")
  local name = order and code .. width
  local swap = order == ">"
  if FLOATS[name] then return { kind = FLOATS[name], size = FLOATS[name].size, swap = swap } end
  if INTEGERS[name] then
    local row = INTEGERS[name]
    return { kind = row.kind, size = tonumber(width), swap = swap, integer = row }
  end
  return nil, ("it holds '%s', which is no type cuflash can read (f2, f4, f8, integers and booleans)"):format(descr)
end

-- Reverses the bytes of each element.
local function swap_bytes(data, count, size)
  local bytes = ffi.cast("uint8_t *", data)
  for i = 0, count - 1 do
    local low, high = i * size, i * size + size - 1
    while low < high do
      bytes[low], bytes[high] = bytes[high], bytes[low]
      low, high = low + 1, high - 1
    end
  end
end

local CHUNK = 65536

local function read_integers(file, target, count, type)
  local buffer = ffi.new(type.integer.type .. "[?]", CHUNK)
  local out = ffi.cast(type.kind.pointer, target)
  for first = 0, count - 1, CHUNK do
    local n = math.min(CHUNK, count - first)
    if not files.read(file, buffer, n * type.size) then return nil, "it ends too early" end
    if type.swap then swap_bytes(buffer, n, type.size) end
    for i = 0, n - 1 do
      local value = tonumber(buffer[i])
      if type.integer.wide and (value > 2 ^ 53 or value < -2 ^ 53) then
        return nil, ("it holds the integer %s, which float64 cannot hold exactly"):format(
          (tostring(buffer[i]):gsub("U?LL$", "")))
      end
      out[first + i] = value
    end
  end
  return true
end

-- The header of an open file: its fields, with the type and the place of the data.
local function read_header(file, size)
  local magic = file:read(8)
  if not magic or #magic < 8 or magic:sub(1, 6) ~= MAGIC then
    return nil, "it is not a .npy file" .. (magic and magic:sub(1, 2) == "PK" and " (.npz archives must be unpacked first)" or "")
  end
  local major, minor = magic:byte(7, 8)
  if major < 1 or major > 3 or minor ~= 0 then
    return nil, ("its format has version %d.%d, this reads 1.0 to 3.0"):format(major, minor)
  end
  local width = major == 1 and 2 or 4
  local length_bytes = file:read(width)
  if not length_bytes or #length_bytes < width then return nil, "it ends within its header" end
  local length = 0
  for i = width, 1, -1 do length = length * 256 + length_bytes:byte(i) end
  if length > size - 8 - width then
    return nil, ("its header claims %.0f bytes, the file has only %.0f left"):format(length, size - 8 - width)
  end
  if length > 2 ^ 20 then return nil, ("its header claims %.0f bytes, too many for one array"):format(length) end
  local text = file:read(length)
  if not text or #text < length then return nil, "it ends within its header" end
  local header, problem = parse_header(text)
  if not header then return nil, problem end
  header.type, problem = find_type(header.descr)
  if not header.type then return nil, problem end
  local expected, have = header.count * header.type.size, size - 8 - width - length
  if expected ~= have then
    return nil, ("its header describes %.0f bytes of data, the file has %.0f"):format(expected, have)
  end
  return header
end

local function read_tensor(file, header)
  local sizes, kind = header.sizes, header.type.kind
  if header.fortran then
    sizes = {}
    for i, n in ipairs(header.sizes) do sizes[#header.sizes - i + 1] = n end
  end
  local tensor = memory.empty("load", kind, C.CUFLASH_CPU, sizes)
  local data = tensor.handle.data
  local ok, problem
  if header.type.integer then
    ok, problem = read_integers(file, data, header.count, header.type)
  else
    ok, problem = files.read(file, data, header.count * kind.size), "it ends too early"
    if ok and header.type.swap then swap_bytes(data, header.count, kind.size) end
  end
  if not ok then
    tensor:free()
    return nil, problem
  end
  if not header.fortran or #sizes < 2 then return tensor end
  local turned = tensor
  for i = 1, math.floor(#sizes / 2) do turned = turned:transpose(i, #sizes + 1 - i) end
  local result = turned:clone()
  tensor:free()
  return result
end

--- Reads a .npy file.
-- @tparam string path
-- @tparam[opt] table options dtype (that of the file), device ("cpu")
-- @treturn Tensor or nil and a message that says what is wrong with the file
-- @function load
function npy.load(path, options)
  checks.path("load", "path", path)
  options = checks.options("load", options, { dtype = true, device = true })
  local kind = checks.dtype("load", "dtype", options.dtype)
  local device = checks.device("load", "device", options.device, C.CUFLASH_CPU)
  local file, size = files.open(path)
  if not file then return nil, size end
  local called, tensor, problem = pcall(function()
    local header, message = read_header(file, size)
    if not header then return nil, message end
    return read_tensor(file, header)
  end)
  file:close()
  if not called then error(tensor, 0) end
  if not tensor then return nil, ("%s: %s"):format(path, problem) end
  local result = copies.to("load", tensor, kind or dtype.of(tensor), device)
  if not rawequal(result, tensor) then tensor:free() end
  return result
end

assert(ffi.abi("le"), "cuflash: files are little-endian, and so must this machine be")

return npy
