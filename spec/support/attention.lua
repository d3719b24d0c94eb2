--- What the attention specs share: running a case, the oracle, the bounds, and the errors of a naive implementation.
--
-- A case is a table: name, seq_q, seq_k, dim, and, where not the default, batch (1), heads (1), heads_kv (heads),
-- dim_v (dim), causal (false), scale (1 / sqrt(dim)), bound (attention.bound) and fill, which makes the inputs
-- (attention.normal), always on the CPU. What is tested runs on $CUFLASH_SPEC_DEVICE, the CPU without it; there the inputs are
-- moved, and every result is brought back to be looked at.

local ffi = require "ffi"
local bit = require "bit"
local assert = require "luassert"
local cf = require "cuflash"
local C = require("cuflash.library").C

local attention = { device = os.getenv "CUFLASH_SPEC_DEVICE" or "cpu" }

local on_cpu = attention.device == "cpu"

--- The largest head dimension that the device has kernels for.
attention.max_dim = on_cpu and 512 or 256

attention.dtypes = { "float32", "float16", "bfloat16" }
attention.inputs = { "q", "k", "v", "d_o" }
attention.outputs = { "o", "lse", "dq", "dk", "dv" }
attention.gradients = { "dq", "dk", "dv" }

-- float32: |got - expected| / |expected| in the Frobenius norm. 16 bits: the largest difference is at most `naive` times
-- that of a naive implementation in the same dtype, plus 1e-5. lse: the largest difference over max(1, |expected|).
attention.bound = {
  float32 = { o = { norm = 2e-6 }, dq = { norm = 5e-6 }, dk = { norm = 5e-6 }, dv = { norm = 5e-6 } },
  float16 = { o = { naive = 2 }, dq = { naive = 3 }, dk = { naive = 3 }, dv = { naive = 3 } },
  lse = 1e-5,
}
attention.bound.bfloat16 = attention.bound.float16

-- The same, where true gradients vanish or nearly so: what is left is the rounding of terms that cancel, so dq and dk
-- are measured against the norm of those terms, all taken as positive.
attention.cancelling_bound = {
  float32 = { o = { norm = 2e-6 }, dq = { terms = 5e-6 }, dk = { terms = 5e-6 }, dv = { norm = 5e-6 } },
  float16 = attention.bound.float16,
  bfloat16 = attention.bound.bfloat16,
  lse = attention.bound.lse,
}

-- ---- Cases -------------------------------------------------------------------------------------------------

local function seed_of(text)
  local seed = 17
  for i = 1, #text do seed = (seed * 31 + text:byte(i)) % 2 ^ 31 end
  return seed
end

--- The case with its defaults filled in, and fields of `changes` instead of its own.
function attention.case(case, changes)
  local full = {}
  for key, value in pairs(case) do full[key] = value end
  for key, value in pairs(changes or {}) do full[key] = value end
  full.name = full.name or "unnamed"
  full.batch = full.batch or 1
  full.heads = full.heads or 1
  full.heads_kv = full.heads_kv or full.heads
  full.dim_v = full.dim_v or full.dim
  full.causal = full.causal or false
  full.bound = full.bound or attention.bound
  full.fill = full.fill or attention.normal
  return full
end

--- The shapes of a case's tensors by name.
function attention.shapes(case)
  local q = { case.batch, case.heads, case.seq_q, case.dim }
  local k = { case.batch, case.heads_kv, case.seq_k, case.dim }
  local v = { case.batch, case.heads_kv, case.seq_k, case.dim_v }
  local o = { case.batch, case.heads, case.seq_q, case.dim_v }
  return { q = q, k = k, v = v, o = o, d_o = o, lse = { case.batch, case.heads, case.seq_q }, dq = q, dk = k, dv = v }
end

--- Normal numbers for q, k, v and d_o, always the same for a case of that name.
function attention.normal(case)
  local shapes, generator, inputs = attention.shapes(case), cf.generator(seed_of(case.name)), {}
  for _, name in ipairs(attention.inputs) do inputs[name] = cf.randn(shapes[name], { generator = generator }) end
  return inputs
end

--- A generator that is always the same for a case of that name.
function attention.generator(case)
  return cf.generator(seed_of(case.name) + 1)
end

--- A copy of a tensor on the device that is tested.
function attention.to_device(tensor, dtype)
  return tensor:to { dtype = dtype or tensor.dtype, device = attention.device }
end

--- The inputs of a case in a dtype, on the device.
function attention.make(case, dtype)
  local inputs = {}
  for name, tensor in pairs(case.fill(case)) do inputs[name] = attention.to_device(tensor, dtype) end
  return inputs
end

local function run(f, inputs, options)
  local o, ctx = f(inputs.q, inputs.k, inputs.v, options)
  local dq, dk, dv = ctx:backward(inputs.d_o)
  return { o = o, lse = ctx.lse, dq = dq, dk = dk, dv = dv }
end

--- Runs attention forward and backward; the outputs by name. They are bit-equal from run to run, dq too, unless told otherwise.
function attention.run(case, inputs, deterministic)
  return run(cf.attention, inputs, { causal = case.causal, scale = case.scale, deterministic = deterministic ~= false })
end

--- The same by the oracle: float64 on the CPU.
function attention.oracle(case, inputs)
  return run(cf.reference.attention, inputs, { causal = case.causal, scale = case.scale })
end

--- The C struct of a problem, for what Lua does not offer. Tensors may be missing; they must outlive it.
function attention.problem(case, tensors)
  local p = ffi.new "cuflash_attention"
  p.struct_size = ffi.sizeof(p)
  for _, name in ipairs { "q", "k", "v", "o", "lse", "d_o", "dq", "dk", "dv" } do
    if tensors[name] then p[name] = tensors[name].handle end
  end
  p.flags = bit.bor(C.CUFLASH_DETERMINISTIC, case.causal and C.CUFLASH_CAUSAL or 0)
  if case.scale then
    p.flags = bit.bor(p.flags, C.CUFLASH_SCALE)
    p.scale = case.scale
  end
  return p
end

--- Runs a pass, "forward" or "backward", of a C problem. Returns true, or nil and the library's message.
function attention.try(pass, p)
  if C["cuflash_attention_" .. pass](p) == C.CUFLASH_SUCCESS then return true end
  return nil, ffi.string(C.cuflash_last_error())
end

--- Runs a pass on the given tensors by the C call itself.
function attention.call(case, pass, tensors)
  local ok, message = attention.try(pass, attention.problem(case, tensors))
  assert(ok, message)
end

-- ---- Bits --------------------------------------------------------------------------------------------------

local sizes = { float32 = 4, float64 = 8, float16 = 2, bfloat16 = 2 }

--- The bytes of a tensor's elements in row-major order: equal strings are equal bits, NaN included.
function attention.bits(tensor)
  local flat = tensor:cpu():contiguous()
  return ffi.string(flat:data(), flat:numel() * sizes[flat.dtype])
end

--- Asserts that two tensors hold the same bits.
function attention.same_bits(expected, actual, what)
  if attention.bits(expected) == attention.bits(actual) then return end
  local _, report = cf.all_close(actual, expected, { rtol = 0, atol = 0, equal_nan = true })
  assert(false, ("%s: expected the same bits; %s"):format(what, tostring(report)))
end

--- Asserts that two sets of outputs hold the same bits.
function attention.all_same_bits(expected, actual, what)
  for _, name in ipairs(attention.outputs) do
    if expected[name] and actual[name] then
      attention.same_bits(expected[name], actual[name], what and name .. " " .. what or name)
    end
  end
end

local function kernel_of(case, tensors)
  return cf.explain(tensors.q, tensors.k, tensors.v, { causal = case.causal, scale = case.scale, pass = "forward" }).forward.kernel
end

--- Asserts that a case gives the same wherever its tensors lie: the same bits, or numbers within the bounds where another kernel
-- takes tensors that lie so. `expected` was made of `inputs`; `views` hold the same numbers and gave `actual`.
function attention.agree(case, dtype, inputs, expected, views, actual, what)
  if kernel_of(case, inputs) == kernel_of(case, views) then
    attention.all_same_bits(expected, actual, what)
  else
    attention.check(case, dtype, inputs, actual)
  end
end

-- ---- A naive implementation --------------------------------------------------------------------------------

-- What a 16-bit dtype can hold. Below `tiny` numbers are multiples of a fixed step, and adding and subtracting `magic`
-- rounds to it; above, `split` does (Dekker's and Veltkamp's splitting of a double).
local formats = {
  float16 = { tiny = 2 ^ -14, magic = 1.5 * 2 ^ 28, split = 2 ^ (53 - 11) + 1, max = 65504 },
  bfloat16 = { tiny = 2 ^ -126, magic = 1.5 * 2 ^ -81, split = 2 ^ (53 - 8) + 1, max = (2 - 2 ^ -7) * 2 ^ 127 },
  float64 = false,
}

local function round(x, format)
  if not format or x * 0 ~= 0 then return x end
  if x < format.tiny and x > -format.tiny then return (x + format.magic) - format.magic end
  local far = x * format.split
  local near = far - (far - x)
  if near > format.max then return math.huge elseif near < -format.max then return -math.huge end
  return near
end

--- A number rounded to a 16-bit dtype.
function attention.round(x, dtype)
  return round(x, formats[dtype])
end

local doubles = ffi.typeof "double[?]"

-- c[i][j] = round(sum over l of a[i][l] * b[j][l]), i < m, j < n, l < k; a and b start at the given elements.
local function product(a, b, m, n, k, format)
  local c = doubles(m * n)
  for i = 0, m - 1 do
    for j = 0, n - 1 do
      local s0, s1, s2, s3, x, y, l = 0, 0, 0, 0, i * k, j * k, 0
      while l + 4 <= k do
        s0 = s0 + a[x + l] * b[y + l]
        s1 = s1 + a[x + l + 1] * b[y + l + 1]
        s2 = s2 + a[x + l + 2] * b[y + l + 2]
        s3 = s3 + a[x + l + 3] * b[y + l + 3]
        l = l + 4
      end
      while l < k do
        s0 = s0 + a[x + l] * b[y + l]
        l = l + 1
      end
      c[i * n + j] = round(s0 + s1 + s2 + s3, format)
    end
  end
  return c
end

local function transposed(a, m, n)
  local t = doubles(m * n)
  for i = 0, m - 1 do
    for j = 0, n - 1 do t[j * m + i] = a[i * n + j] end
  end
  return t
end

local function positive(a, n)
  local b = doubles(n)
  for i = 0, n - 1 do b[i] = math.abs(a[i]) end
  return b
end

-- prob[i][j] from the scores of one head; hidden keys get 0.
local function softmax(scores, case, scale, format)
  local offset = case.seq_k - case.seq_q
  for i = 0, case.seq_q - 1 do
    local row, max, sum = i * case.seq_k, -math.huge, 0
    local last = case.causal and math.min(i + offset, case.seq_k - 1) or case.seq_k - 1
    for j = 0, last do
      scores[row + j] = round(scores[row + j] * scale, format)
      max = math.max(max, scores[row + j])
    end
    for j = 0, last do
      scores[row + j] = math.exp(scores[row + j] - max)
      sum = sum + scores[row + j]
    end
    for j = 0, last do scores[row + j] = round(scores[row + j] / sum, format) end
    for j = math.max(last + 1, 0), case.seq_k - 1 do scores[row + j] = 0 end
  end
  return scores
end

-- ds from prob and dp; `sign` is 1 to add up what the formula subtracts.
local function softmax_gradient(prob, dp, case, scale, format, sign)
  local ds = doubles(case.seq_q * case.seq_k)
  for i = 0, case.seq_q - 1 do
    local row, delta = i * case.seq_k, 0
    for j = 0, case.seq_k - 1 do delta = delta + prob[row + j] * dp[row + j] end
    for j = 0, case.seq_k - 1 do
      ds[row + j] = round(round(prob[row + j] * (dp[row + j] + sign * delta), format) * scale, format)
    end
  end
  return ds
end

local function add(sum, x, n)
  for i = 0, n - 1 do sum[i] = sum[i] + x[i] end
end

-- Attention of one KV head and its query heads as the formulas say, every matrix rounded to the format once it is
-- computed. Sums are exact, which flatters the naive implementation and so tightens the bounds made from it.
-- With `terms`, dq and dk are sums of the absolute values of their terms. visit(name, first, values, n) takes the results,
-- from element `first` of a row-major tensor.
local function naive_unit(case, data, b, kv, format, terms, visit)
  local group, m, n, d, dv = case.heads / case.heads_kv, case.seq_q, case.seq_k, case.dim, case.dim_v
  local scale = case.scale or 1 / math.sqrt(d)
  local unit = b * case.heads_kv + kv
  local k, v = data.k + unit * n * d, data.v + unit * n * dv
  local dk_sum, dv_sum = doubles(n * d), doubles(n * dv)
  for h = kv * group, (kv + 1) * group - 1 do
    local head = b * case.heads + h
    local q, d_o = data.q + head * m * d, data.d_o + head * m * dv
    local prob = softmax(product(q, k, m, n, d, format), case, scale, format)
    visit("o", head * m * dv, product(prob, transposed(v, n, dv), m, dv, n, format), m * dv)
    local dp
    if terms then
      dp = product(positive(d_o, m * dv), positive(v, n * dv), m, n, dv, format)
      q, k, scale = positive(q, m * d), positive(k, n * d), math.abs(scale)
    else
      dp = product(d_o, v, m, n, dv, format)
    end
    local ds = softmax_gradient(prob, dp, case, scale, format, terms and 1 or -1)
    visit("dq", head * m * d, product(ds, transposed(k, n, d), m, d, n, format), m * d)
    add(dk_sum, product(transposed(ds, m, n), transposed(q, m, d), n, d, m, false), n * d)
    add(dv_sum, product(transposed(prob, m, n), transposed(d_o, m, dv), n, dv, m, false), n * dv)
  end
  for i = 0, n * d - 1 do dk_sum[i] = round(dk_sum[i], format) end
  for i = 0, n * dv - 1 do dv_sum[i] = round(dv_sum[i], format) end
  visit("dk", unit * n * d, dk_sum, n * d)
  visit("dv", unit * n * dv, dv_sum, n * dv)
end

-- Multiply-adds of one product after which no further KV heads are computed naively.
local NAIVE_WORK = 4e6

-- Large cases are computed naively for their first KV heads only: the largest error of some is at most that of
-- all, so the bound is only the tighter for it.
local function naive(case, inputs, format, terms, visit)
  local data, holders = {}, {}
  for _, name in ipairs(attention.inputs) do
    holders[name] = inputs[name]:cpu():double():contiguous()
    data[name] = holders[name]:data()
  end
  local work, each = 0, case.heads / case.heads_kv * case.seq_q * case.seq_k * math.max(case.dim, case.dim_v)
  for unit = 0, case.batch * case.heads_kv - 1 do
    if work > NAIVE_WORK and not terms then return end
    naive_unit(case, data, math.floor(unit / case.heads_kv), unit % case.heads_kv, format, terms, visit)
    work = work + each
  end
  return holders -- alive until here
end

--- The largest errors of a naive implementation in a dtype, by the name of the output.
function attention.naive_errors(case, inputs, expected, dtype)
  local errors = { o = 0, dq = 0, dk = 0, dv = 0 }
  naive(case, inputs, formats[dtype], false, function(name, first, values, n)
    local want, worst = expected[name]:data() + first, errors[name]
    for i = 0, n - 1 do worst = math.max(worst, math.abs(values[i] - want[i])) end
    errors[name] = worst
  end)
  return errors
end

--- The Frobenius norms of dq and dk were none of their terms to cancel.
function attention.norms_of_terms(case, inputs)
  local squares = { o = 0, dq = 0, dk = 0, dv = 0 }
  naive(case, inputs, false, true, function(name, _, values, n)
    local sum = 0
    for i = 0, n - 1 do sum = sum + values[i] * values[i] end
    squares[name] = squares[name] + sum
  end)
  for name, value in pairs(squares) do squares[name] = math.sqrt(value) end
  return squares
end

-- ---- Checking ----------------------------------------------------------------------------------------------

--- The largest difference of two log-sum-exps, relative to max(1, |expected|); NaN if there is one.
function attention.lse_difference(actual, expected)
  local a, e = actual:cpu():double():contiguous(), expected:cpu():double():contiguous()
  local x, y, worst = a:data(), e:data(), 0
  for i = 0, a:numel() - 1 do
    if x[i] ~= y[i] then
      local d = math.abs(x[i] - y[i]) / math.max(1, math.abs(y[i]))
      if d ~= d then return d end
      worst = math.max(worst, d)
    end
  end
  return worst
end

--- Asserts that d <= bound, which NaN is not.
function attention.within(d, bound, what)
  assert(d <= bound, ("%s: expected a difference of at most %.3g, got %.3g"):format(what, bound, d))
end

local function frobenius(tensor)
  local x = tensor:cpu():double()
  return math.sqrt((x * x):sum())
end

-- One output against the oracle's. `context` is what bounds are made from: made once, when first needed.
local function check_output(name, actual, expected, bound, context)
  local _, report = cf.all_close(actual, expected)
  if bound.naive then
    context.naive = context.naive or attention.naive_errors(context.case, context.inputs, context.expected, context.dtype)
    attention.within(report.max_abs, bound.naive * context.naive[name] + 1e-5, name)
    return
  end
  local size, allowed = frobenius(expected), bound.norm
  -- a true gradient of exactly 0 has no relative error: it is measured as cancelling gradients are
  if bound.terms or size == 0 and (name == "dq" or name == "dk") then
    size, allowed = attention.norms_of_terms(context.case, context.inputs)[name], bound.terms or bound.norm
  end
  attention.within(frobenius(actual:cpu():double() - expected), allowed * size, name)
end

--- Asserts that outputs, all or some, agree with the oracle's within the bounds of the case.
function attention.check(case, dtype, inputs, actual, expected)
  expected = expected or attention.oracle(case, inputs)
  local context = { case = case, dtype = dtype, inputs = inputs, expected = expected }
  if actual.lse then attention.within(attention.lse_difference(actual.lse, expected.lse), case.bound.lse, "lse") end
  for _, name in ipairs { "o", "dq", "dk", "dv" } do
    if actual[name] then check_output(name, actual[name], expected[name], case.bound[dtype][name], context) end
  end
end

--- Runs a case in a dtype and checks all outputs. Returns them, with the inputs.
function attention.verify(case, dtype)
  local inputs = attention.make(case, dtype)
  local actual, expected = attention.run(case, inputs), attention.oracle(case, inputs)
  attention.check(case, dtype, inputs, actual, expected)
  if not on_cpu then -- dq of any order of additions is another computation, the rest is not
    local unordered = attention.run(case, inputs, false)
    attention.check(case, dtype, inputs, { dq = unordered.dq }, expected)
    unordered.dq = nil
    attention.all_same_bits(actual, unordered, "without asking for determinism")
  end
  return actual, inputs
end

return attention
