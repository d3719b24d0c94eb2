-- Wall-clock time in seconds. (os.clock adds up what all threads spend.)
local ffi = require "ffi"

ffi.cdef [[ int cuflash_examples_clock(int clock, int64_t time[2]) __asm__("clock_gettime"); ]]

local MONOTONIC = 1
local time = ffi.new "int64_t[2]" -- struct timespec on 64-bit systems: seconds, nanoseconds

return function()
  ffi.C.cuflash_examples_clock(MONOTONIC, time)
  return tonumber(time[0]) + tonumber(time[1]) * 1e-9
end
