--- Memory that LuaJIT's collector does not see: what is held, limits, and when to collect.
-- @module cuflash.memory

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local handle = require "cuflash.handle"

local memory = {}

local C = native.C

local GROWTH = 1.4   -- of the soft limit, while
local CROWDED = 0.8  -- more than this part of it is in use after a collection
local FIRST_LIMIT = 256 * 2 ^ 20

local soft_limits = {} -- device -> bytes

local stats = ffi.new "cuflash_memory_stats"
local shape_buffer = ffi.new("int64_t[?]", tonumber(C.CUFLASH_MAX_DIMS))

local function live_bytes(device)
  if C.cuflash_memory_get_stats(device, stats) ~= C.CUFLASH_SUCCESS then return 0 end
  return tonumber(stats.live_bytes)
end

-- Tensors that nothing refers to any more are small to the collector, so it would let them pile up. Collects where
-- the next allocation would pass the soft limit, which then grows with what is really in use.
local function make_room(device, bytes)
  local limit = soft_limits[device] or FIRST_LIMIT
  if live_bytes(device) + bytes <= limit then return end
  collectgarbage()
  local needed = live_bytes(device) + bytes
  while needed > CROWDED * limit do limit = limit * GROWTH end
  soft_limits[device] = math.floor(limit)
end

--- A C array of sizes, valid until the next call.
-- @function c_shape
-- @local
function memory.c_shape(sizes)
  for i = 1, #sizes do shape_buffer[i - 1] = sizes[i] end
  return shape_buffer
end

--- A new tensor of undefined values.
-- @tparam string name what the user called
-- @tparam table kind a row of cuflash.dtype
-- @tparam number device as C counts them
-- @tparam table sizes checked sizes
-- @function empty
-- @local
function memory.empty(name, kind, device, sizes)
  local bytes = kind.size
  for i = 1, #sizes do bytes = bytes * sizes[i] end
  make_room(device, bytes)
  local tensor = handle.type()
  native.call(name, C.cuflash_tensor_empty, tensor, kind.code, device, #sizes, memory.c_shape(sizes))
  return tensor
end

--- What tensors hold on a device.
-- The fields are live_bytes, peak_bytes, live_storages, total_storages and limit_bytes (0: no limit). Tensors that
-- nothing refers to any more count until the collector runs or they are freed with t:free().
-- @tparam[opt="cpu"] string device
-- @treturn table
-- @function memory_stats
function memory.memory_stats(device)
  device = checks.device("memory_stats", "device", device, C.CUFLASH_CPU)
  local now = ffi.new "cuflash_memory_stats"
  native.call("memory_stats", C.cuflash_memory_get_stats, device, now)
  local result = {}
  for _, field in ipairs { "live_bytes", "peak_bytes", "live_storages", "total_storages", "limit_bytes" } do
    result[field] = tonumber(now[field])
  end
  return result
end

--- Starts the count of peak_bytes anew, from what is held now.
-- @tparam[opt="cpu"] string device
-- @function memory_reset_peak
function memory.memory_reset_peak(device)
  device = checks.device("memory_reset_peak", "device", device, C.CUFLASH_CPU)
  native.call("memory_reset_peak", C.cuflash_memory_reset_peak, device)
end

--- Gives memory that tensors no longer hold back to a CUDA device, for other programs: it is kept for the next tensor otherwise.
-- Collects garbage first, and waits for the device. Without a device named, does nothing where there is no CUDA. On the CPU what
-- is kept is a workspace of 1 to 256 MiB, for the next call that needs one as large.
-- @tparam[opt="cuda"] string device
-- @function memory_trim
function memory.memory_trim(device)
  collectgarbage()
  if device == nil and C.cuflash_cuda_device_count() == 0 then return end
  device = checks.device("memory_trim", "device", device, 0)
  native.call("memory_trim", C.cuflash_memory_trim, device)
end

--- Sets a hard limit: an allocation that would pass it collects garbage, tries again and then raises.
-- @tparam string device "cpu", "cuda" or "cuda:N"
-- @tparam number bytes 0 removes the limit
-- @function memory_limit
function memory.memory_limit(device, bytes)
  if device == nil then checks.fail("memory_limit", "device", "'cpu', 'cuda' or 'cuda:N'", device) end
  device = checks.device("memory_limit", "device", device)
  bytes = checks.integer("memory_limit", "bytes", bytes, 0, 2 ^ 53)
  native.call("memory_limit", C.cuflash_memory_set_limit, device, bytes)
end

--- The number of bytes past which an allocation collects garbage first. It grows by itself: by 1.4 while more than
-- 80 % of it is really in use. At first 256 MiB.
-- @tparam[opt] number bytes a new soft limit
-- @tparam[opt="cpu"] string device
-- @treturn number the soft limit
-- @function memory_soft_limit
function memory.memory_soft_limit(bytes, device)
  device = checks.device("memory_soft_limit", "device", device, C.CUFLASH_CPU)
  if bytes ~= nil then soft_limits[device] = checks.integer("memory_soft_limit", "bytes", bytes, 1, 2 ^ 53) end
  return soft_limits[device] or FIRST_LIMIT
end

return memory
