--- The oracle: attention computed naively in float64 on the CPU. Slow on purpose.
-- @module cuflash.reference

local native = require "cuflash.native"
local checks = require "cuflash.checks"
local dtype = require "cuflash.dtype"
local copies = require "cuflash.copies"
local attention = require "cuflash.attention"

local reference = {}

local C = native.C

local oracle = {
  name = "reference.attention",
  options = { causal = true, scale = true, out = true },
  forward = C.cuflash_reference_forward,
  backward = C.cuflash_reference_backward,
  dtype = dtype.float64,
  device = C.CUFLASH_CPU,
  lse_dtype = dtype.float64,
}

-- The oracle runs on the CPU, whatever device the inputs are on.
local function on_cpu(argument, tensor)
  checks.tensor(oracle.name, argument, tensor)
  return (copies.to(oracle.name, tensor, dtype.of(tensor), C.CUFLASH_CPU))
end

--- Attention computed naively in float64 on the CPU, from inputs of any dtype and device: what cf.attention is
-- checked against. The context's backward computes the gradients the same way. All results are on the CPU.
-- @tparam Tensor q [batch x heads x seq_q x head_dim]
-- @tparam Tensor k [batch x heads_kv x seq_k x head_dim]
-- @tparam Tensor v [batch x heads_kv x seq_k x head_dim_v]
-- @tparam[opt] table options causal, scale, out
-- @treturn Tensor o [batch x heads x seq_q x head_dim_v], float64
-- @treturn Context with ctx.lse, float64, ctx:backward(d_o) and ctx:free()
-- @function reference.attention
function reference.attention(q, k, v, options)
  q, k, v = on_cpu("q", q), on_cpu("k", k), on_cpu("v", v)
  return attention.run(oracle, q, k, v, options)
end

return reference
