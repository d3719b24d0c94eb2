--- CUDA devices.
-- @module cuflash.cuda

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local stream = require "cuflash.stream"

local C = native.C

local cuda = { stream = stream.stream, event = stream.event, with_stream = stream.with_stream }

--- Whether tensors can live on a CUDA device.
-- @treturn boolean
-- @treturn[opt] string why not
-- @function cuda.is_available
function cuda.is_available()
  if C.cuflash_device_check(0) == C.CUFLASH_SUCCESS then return true end
  return false, ffi.string(C.cuflash_last_error())
end

--- The number of CUDA devices.
-- @treturn number
-- @function cuda.device_count
function cuda.device_count()
  return C.cuflash_cuda_device_count()
end

--- What a CUDA device is: name, compute (90 is sm_90), multiprocessors, shared_bytes (per block), total_bytes and free_bytes of
-- memory, and the versions of CUDA that the driver is for (driver) and that compiled the kernels (toolkit): "13.0".
-- @tparam[opt="cuda"] string device
-- @treturn table
-- @function cuda.device_info
function cuda.device_info(device)
  local info = ffi.new "cuflash_cuda_device_info"
  device = checks.cuda_device("cuda.device_info", "device", device)
  native.call("cuda.device_info", C.cuflash_cuda_get_device_info, device, info)
  local function version(number) return ("%d.%d"):format(math.floor(number / 1000), math.floor(number % 1000 / 10)) end
  return {
    name = ffi.string(info.name), compute = 10 * info.compute_major + info.compute_minor,
    multiprocessors = info.multiprocessors, shared_bytes = info.shared_bytes,
    total_bytes = tonumber(info.total_bytes), free_bytes = tonumber(info.free_bytes),
    driver = version(info.driver_version), toolkit = version(info.toolkit_version),
  }
end

return cuda
