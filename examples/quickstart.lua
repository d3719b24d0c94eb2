-- The library in ten lines: tensors, attention forward and backward, a check against the float64 reference, and which
-- kernel did the work.
--
--     luajit examples/quickstart.lua

-- Finds support/ beside this file, and the repository's cuflash where none is installed.
local here = arg[0]:match "^(.*/)" or "./"
package.path = here .. "?.lua;" .. package.path .. ";" .. here .. "../lua/?.lua;" .. here .. "../lua/?/init.lua"

local cf = require "cuflash"
local arguments = require "support.arguments"
local clock = require "support.clock"

local options = arguments.parse {
  usage = "quickstart.lua [options]",
  about = "Runs attention forward and backward and checks both against the float64 reference.",
  { "--dtype", "NAME", "float32, float16 or bfloat16", default = "float32", among = { "float32", "float16", "bfloat16" } },
}
local like = { dtype = options.dtype, device = options.device }
local causal = { causal = true }

-- The ten lines.
cf.manual_seed(42)
local q = cf.randn({ 1, 8, 512, 64 }, like) -- batch, heads, tokens, head dimension
local k = cf.randn({ 1, 2, 512, 64 }, like) -- four query heads share one KV head
local v = cf.randn({ 1, 2, 512, 64 }, like)
local o, ctx = arguments.try(cf.attention, q, k, v, causal)
local d_o = cf.randn_like(o)
local dq, dk, dv = ctx:backward(d_o)
local exact_o, exact = cf.reference.attention(q, k, v, causal) -- the same, naively, in float64
local exact_dq, exact_dk, exact_dv = exact:backward(d_o)

print(("cuflash %s, %s on %s"):format(cf.version, q.dtype, q.device))
print(("q %s, k and v %s, causal\n"):format(q:shape(), k:shape()))

-- What the rounding of a dtype may add up to: of the results, and on tensor cores of the weights and their gradients too.
local bound = ({ float32 = 5e-6, float16 = 4e-3, bfloat16 = 3e-2 })[q.dtype]
local all_close = true

local function check(name, actual, expected)
  local close, report = cf.all_close(actual, expected, { rtol = bound, atol = bound })
  all_close = all_close and close
  print(("%-4s %-26s %10.1e %11.1e   %s"):format(name, actual:shape(), report.rel_norm, report.max_abs,
    close and "close" or "NOT CLOSE"))
end

print "against the float64 reference   rel. error    max diff"
check("o", o, exact_o)
check("lse", ctx.lse, exact.lse)
check("dq", dq, exact_dq)
check("dk", dk, exact_dk)
check("dv", dv, exact_dv)

-- The fastest of a few runs. A product of two matrices counts 2 operations per multiply-add; a causal mask skips half.
local function fastest(f)
  local best = math.huge
  for _ = 1, 5 do
    local start = clock()
    f()
    cf.synchronize()
    best = math.min(best, clock() - start)
  end
  return best
end

local product = 2 * 8 * 512 * 512 * 64 / 2
local function report_speed(name, products, f)
  local seconds = fastest(f)
  print(("%-9s %8.2f ms %8.1f GFLOP/s"):format(name, seconds * 1e3, products * product / seconds * 1e-9))
end

print()
report_speed("forward", 2, function() cf.attention(q, k, v, { causal = true, out = o }) end)
report_speed("backward", 5, function() ctx:backward(d_o, { dq = dq, dk = dk, dv = dv }) end)

print "\ncf.explain says"
print((tostring(cf.explain(q, k, v, { causal = true, pass = "forward" })):gsub("[^\n]+", "  %0")))

if not all_close then arguments.fail "a result is not close to the reference" end
