--- The machine: CPU instruction set, threads, and waiting for devices.
-- @module cuflash.machine

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"

local C = native.C

local machine = { cpu = {} }

--- The instruction set of the CPU kernels: "baseline", "avx2", "avx512", "avx512bf16" or "amx". The environment variable
-- CUFLASH_CPU_ISA chooses another.
-- @treturn string
-- @function cpu.isa
function machine.cpu.isa()
  return ffi.string(C.cuflash_cpu_isa())
end

--- Waits until all work queued on a device is done. The CPU never has any.
-- @tparam[opt] string device without it all CUDA devices
-- @function synchronize
function machine.synchronize(device)
  if device ~= nil then
    native.call("synchronize", C.cuflash_synchronize, checks.device("synchronize", "device", device))
    return
  end
  for ordinal = 0, C.cuflash_cuda_device_count() - 1 do
    native.call("synchronize", C.cuflash_synchronize, ordinal)
  end
end

--- The number of threads a call on the CPU may use.
-- @tparam[opt] number threads a new number
-- @treturn number
-- @function num_threads
function machine.num_threads(threads)
  if threads ~= nil then
    threads = checks.integer("num_threads", "threads", threads, 1, 2 ^ 53)
    native.call("num_threads", C.cuflash_set_num_threads, math.min(threads, 2 ^ 31 - 1)) -- says how many there may be
  end
  return C.cuflash_get_num_threads()
end

return machine
