-- A training step of attention, and whether it costs more than what it is made of. Queries, keys and values learn, by gradient
-- descent, to answer as those of a teacher do. Nothing in a step hands a number to Lua, so on a GPU the script only queues
-- work, and the device goes from one kernel to the next. Afterwards every part is timed alone.
--
--     luajit examples/training_step.lua --device cuda --dtype bfloat16 --batch 16 --heads 16 --seq 1024 --dim 128

-- Finds support/ beside this file, and the repository's cuflash where none is installed.
local here = arg[0]:match "^(.*/)" or "./"
package.path = here .. "?.lua;" .. package.path .. ";" .. here .. "../lua/?.lua;" .. here .. "../lua/?/init.lua"

local cf = require "cuflash"
local arguments = require "support.arguments"
local clock = require "support.clock"
local terminal = require "support.terminal"

local options = arguments.parse {
  usage = "training_step.lua [options]",
  about = "Trains queries, keys and values of one attention, and compares the time of a step with that of its parts.\n"
    .. "Ctrl-C ends the training early.",
  { "--dtype", "NAME", "of what attention computes with; what is learned is float32", default = "float32",
    among = { "float32", "float16", "bfloat16" } },
  { "--batch", "N", "sequences", default = 2, least = 1, most = 1e6, whole = true },
  { "--heads", "N", "of each", default = 4, least = 1, most = 1e6, whole = true },
  { "--seq", "N", "queries and keys of a sequence", default = 256, least = 2, most = 2 ^ 24, whole = true },
  { "--dim", "N", "head dimension", default = 64, least = 1, most = 512, whole = true },
  { "--causal", nil, "a query sees the keys up to its own place" },
  { "--steps", "N", "training steps", default = 60, least = 1, most = 1e6, whole = true },
  { "--rate", "X", "learning rate", default = 0.3, least = 0, most = 10 },
  { "--seed", "N", "of all random numbers", default = 1, least = 0, most = 2 ^ 53, whole = true },
}

local on_cuda = options.device:find "^cuda" ~= nil
local shape = { options.batch, options.heads, options.seq, options.dim }
local device, dtype = { device = options.device }, { device = options.device, dtype = options.dtype }
local attend = { causal = options.causal == true }
cf.manual_seed(options.seed)

local NAMES = { "q", "k", "v" }
local function three(make)
  local tensors = {}
  for _, name in ipairs(NAMES) do tensors[name] = make(name) end
  return tensors
end

local learned = three(function() return cf.randn(shape, device) end) -- in float32, as small steps would be lost in 16 bits
local inputs = three(function(name) return learned[name]:to(options.dtype) end)
local gradients = { dq = cf.empty(shape, dtype), dk = cf.empty(shape, dtype), dv = cf.empty(shape, dtype) }
local teacher = three(function() return cf.randn(shape, dtype) end)
local wanted = cf.attention(teacher.q, teacher.k, teacher.v, attend)

-- ---- A step ------------------------------------------------------------------------------------------

local function forward() return cf.attention(inputs.q, inputs.k, inputs.v, attend) end

-- Half the sum of squared errors, down the output: what is missing from it.
local function differentiate(o) return o - wanted end

local function backward(ctx, d_o) ctx:backward(d_o, gradients) end

local rate = options.rate

local function update()
  for _, name in ipairs(NAMES) do
    learned[name]:sub_(gradients["d" .. name]:to "float32" * rate)
    inputs[name]:copy_(learned[name])
  end
end

local function step()
  local o, ctx = forward()
  backward(ctx, differentiate(o))
  ctx:free()
  update()
end

local function error_now()
  local difference = differentiate(forward()):to "float32"
  return (difference * difference):mean()
end

-- ---- Time --------------------------------------------------------------------------------------------

-- Seconds that f takes in a row of calls: on the device, and of the script, which on a GPU only queues.
local function measure(f)
  local LEAST, WARM = 0.2, 3
  for _ = 1, WARM do f() end
  cf.synchronize()
  local calls = 4
  while true do
    local first, last = on_cuda and cf.cuda.event(), on_cuda and cf.cuda.event()
    if first then first:record() end
    local started = clock()
    for _ = 1, calls do f() end
    local queued = clock() - started
    if last then last:record() end
    cf.synchronize()
    local all = clock() - started
    if all >= LEAST then return { device = (last and first:elapsed(last) * 1e-3 or all) / calls, script = queued / calls } end
    calls = calls * 2
  end
end

local function train()
  local before, left = error_now(), nil
  local every = math.max(1, math.floor(options.steps / 5))
  for i = 1, options.steps do
    step()
    if i % every == 0 or i == options.steps then
      left = error_now() / before
      terminal.progress(("step %4d   mean squared error %.4f of what it was"):format(i, left), true)
    end
  end
  return left
end

print(("q, k, v: %d x %d x %d x %d, %s%s, on %s\n"):format(options.batch, options.heads, options.seq, options.dim, options.dtype,
  attend.causal and ", causal" or "", on_cuda and cf.cuda.device_info(options.device).name or "the CPU"))
local ok, result = terminal.run(train)
if not ok then print "interrupted; a step is timed as it is" end

rate = 0 -- the same work, over and over
local o, ctx = forward()
local d_o = differentiate(o)
local parts = {
  { "forward", forward },
  { "difference", function() differentiate(o) end },
  { "backward", function() backward(ctx, d_o) end },
  { "update", update },
}
print(("\n%-11s %9s"):format("part", "ms"))
local sum = 0
for _, part in ipairs(parts) do
  local seconds = measure(part[2]).device
  sum = sum + seconds
  print(("%-11s %9.3f"):format(part[1], 1e3 * seconds))
end
ctx:free()
local whole = measure(step)
print(("%-11s %9.3f"):format("sum", 1e3 * sum))
print(("%-11s %9.3f   %.3f of the sum%s"):format("step", 1e3 * whole.device, whole.device / sum,
  on_cuda and (", queued in %.3f ms"):format(1e3 * whole.script) or ""))

if ok and options.rate > 0 and not (result < 1) then arguments.fail "it has not learned: the error has not become less" end
