--- cuflash on the device that is tested: $CUFLASH_SPEC_DEVICE, the CPU without it. Whatever makes or loads tensors, limits memory or
-- counts it does so there where it is given no device. On the CPU this is cuflash itself.

local cf = require "cuflash"

local device = os.getenv "CUFLASH_SPEC_DEVICE" or "cpu"
if device == "cpu" then return cf end

local function with_device(options)
  if options ~= nil and (type(options) ~= "table" or options.device ~= nil) then return options end
  local full = { device = device }
  for key, value in pairs(options or {}) do full[key] = value end
  return full
end

local here = { safetensors = { save = cf.safetensors.save } }

-- All are tail calls: an error is raised at the line of the spec.
for _, name in ipairs { "tensor", "empty", "zeros", "ones", "rand", "randn", "load" } do
  here[name] = function(value, options) return cf[name](value, with_device(options)) end
end
function here.full(shape, value, options) return cf.full(shape, value, with_device(options)) end
function here.safetensors.load(path, options) return cf.safetensors.load(path, with_device(options)) end
function here.arange(...)
  local arguments, n = { ... }, select("#", ...)
  if type(arguments[n]) == "table" then n = n - 1 end
  arguments[n + 1] = with_device(arguments[n + 1])
  return cf.arange(unpack(arguments, 1, n + 1))
end

function here.memory_stats(where) return cf.memory_stats(where or device) end
function here.memory_reset_peak(where) return cf.memory_reset_peak(where or device) end
function here.memory_soft_limit(bytes, where) return cf.memory_soft_limit(bytes, where or device) end

return setmetatable(here, { __index = cf })
