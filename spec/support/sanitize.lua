-- Attention on small shapes that leave partial tiles everywhere, for compute-sanitizer to watch (script/gpu-record): every dtype,
-- every head dimension that has kernels of its own, forward and backward, deterministic and not, on strided memory and dense.

local cf = require "cuflash"

local shapes = { -- seq_q, seq_k, heads, heads_kv
  {1, 1, 1, 1}, {65, 97, 2, 1}, {130, 70, 1, 1}, {64, 256, 2, 2},
}
local cases = 0

local function run(dtype, dim, shape, causal, bshd)
  local function make(heads, seq)
    local options = {dtype = dtype, device = "cuda"}
    if bshd then return cf.randn({1, seq, heads, dim}, options):transpose(2, 3) end
    return cf.randn({1, heads, seq, dim}, options)
  end
  local seq_q, seq_k, heads, heads_kv = unpack(shape)
  local q, k, v, d_o = make(heads, seq_q), make(heads_kv, seq_k), make(heads_kv, seq_k), make(heads, seq_q)
  for _, deterministic in ipairs {false, true} do
    local _, ctx = cf.attention(q, k, v, {causal = causal, deterministic = deterministic})
    local dq, dk, dv = ctx:backward(d_o)
    for _, x in ipairs {dq, dk, dv} do
      local sum = x:sum()
      assert(sum == sum, "a gradient is not a number")
    end
    cases = cases + 1
  end
end

cf.manual_seed(11)
for _, dtype in ipairs {"float32", "float16", "bfloat16"} do
  for _, dim in ipairs {32, 59, 64, 96, 128, 256} do
    for i, shape in ipairs(shapes) do run(dtype, dim, shape, (i + dim) % 2 == 0, i % 2 == 0) end
  end
  collectgarbage()
end
print(("sanitize: %d cases"):format(cases))
