-- The oracle itself: against sums done by hand, and its gradients against differences of its own output.

local assert = require "luassert"
local cf = require "cuflash"
local attention = require "spec.support.attention"

local f64 = { dtype = "float64" }

local function close(expected, actual, tolerance, what)
  attention.within(math.abs(actual - expected), tolerance, what)
end

describe("the oracle's forward pass", function()
  -- scores are 0 and ln 3, so the weights are 1/4 and 3/4
  local q = cf.tensor({ { { { 1, 2 } } } }, f64)
  local k = cf.tensor({ { { { 0, 0 }, { math.log(3), 0 } } } }, f64)
  local v = cf.tensor({ { { { 4, 8, 0 }, { 8, 0, 1 } } } }, f64)

  it("weighs the rows of v by hand-computed weights", function()
    local o, ctx = cf.reference.attention(q, k, v, { scale = 1 })
    local expected = { 7, 2, 0.75 }
    for d = 1, 3 do close(expected[d], o[{ 1, 1, 1, d }], 1e-12, "o") end
    close(math.log(4), ctx.lse:item(), 1e-12, "lse")
  end)

  it("multiplies scores by 1 / sqrt(dim) where no scale is given", function()
    local o, ctx = cf.reference.attention(q, k, v)
    local p = 1 / (1 + 3 ^ math.sqrt(0.5)) -- weight of the first key
    close(4 * p + 8 * (1 - p), o[{ 1, 1, 1, 1 }], 1e-6, "o")
    close(-math.log(p), ctx.lse:item(), 1e-6, "lse")
  end)

  it("has the gradients of a hand-computed case", function()
    local _, ctx = cf.reference.attention(q, k, v, { scale = 1 })
    local dq, dk, dv = ctx:backward(cf.tensor({ { { { 1, 0, 4 } } } }, f64))
    -- dp = 4 and 12, their mean under the weights 10: ds = -3/2 and 3/2
    local l3 = math.log(3)
    local expected = {
      { dq, { 1.5 * l3, 0 } },
      { dk, { -1.5, -3, 1.5, 3 } },
      { dv, { 0.25, 0, 1, 0.75, 0, 3 } },
    }
    for _, pair in ipairs(expected) do
      for i, number in ipairs(pair[2]) do close(number, pair[1]:view({ -1 })[i], 1e-12, "gradient") end
    end
  end)

  it("lets a causal query see the keys up to its own, counted from the end", function()
    local ones = cf.ones({ 1, 1, 3, 1 }, f64)
    local values = cf.tensor({ { { { 1 }, { 2 }, { 4 }, { 8 } } } }, f64)
    local keys = cf.zeros({ 1, 1, 4, 1 }, f64)
    local o, ctx = cf.reference.attention(ones, keys, values, { causal = true })
    local expected = { 3 / 2, 7 / 3, 15 / 4 } -- means of 2, 3 and 4 values
    for i = 1, 3 do
      close(expected[i], o[{ 1, 1, i, 1 }], 1e-15, "o")
      close(math.log(i + 1), ctx.lse[{ 1, 1, i }], 1e-15, "lse")
    end
  end)

  it("gives 0 and a log-sum-exp of -inf where a causal query sees nothing", function()
    local case = attention.case { name = "more queries than keys", seq_q = 5, seq_k = 2, dim = 3, causal = true }
    local inputs = attention.normal(case)
    local got = attention.oracle(case, inputs)
    for i = 1, 3 do
      assert.are.equal(-math.huge, got.lse[{ 1, 1, i }])
      for d = 1, 3 do
        assert.are.equal(0, got.o[{ 1, 1, i, d }])
        assert.are.equal(0, got.dq[{ 1, 1, i, d }])
      end
    end
    assert.is_true(got.lse[{ 1, 1, 4 }] > -math.huge)
  end)

  it("pairs query head h with KV head h / (heads / heads_kv)", function()
    local case = attention.case { name = "grouped", batch = 2, heads = 6, heads_kv = 2, seq_q = 3, seq_k = 4, dim = 5 }
    local inputs = attention.normal(case)
    local all = attention.oracle(case, inputs)
    for h = 1, 6 do
      local kv = math.ceil(h / 3)
      local o = cf.reference.attention(inputs.q:narrow(2, h, 1), inputs.k:narrow(2, kv, 1), inputs.v:narrow(2, kv, 1))
      attention.same_bits(o, all.o:narrow(2, h, 1), "o of head " .. h)
    end
  end)

  it("says what the naive implementation says when that rounds nothing", function()
    for _, causal in ipairs { false, true } do
      local case = attention.case {
        name = "naive", batch = 2, heads = 4, heads_kv = 2, seq_q = 9, seq_k = 7, dim = 5, dim_v = 3, causal = causal,
        scale = -0.75,
      }
      local inputs = attention.normal(case)
      local errors = attention.naive_errors(case, inputs, attention.oracle(case, inputs), "float64")
      for name, d in pairs(errors) do attention.within(d, 1e-12, name) end
    end
  end)
end)

-- The loss is the sum of o * d_o, so its gradients are what backward returns for d_o.
local function loss(case, inputs)
  local o = cf.reference.attention(inputs.q, inputs.k, inputs.v, { causal = case.causal, scale = case.scale })
  return (o * inputs.d_o):sum()
end

describe("the oracle's gradients are those of its output", function()
  local cases = {
    { name = "one head", seq_q = 4, seq_k = 4, dim = 3 },
    { name = "causal", seq_q = 4, seq_k = 4, dim = 3, causal = true },
    { name = "more keys than queries", seq_q = 2, seq_k = 6, dim = 3 },
    { name = "more keys than queries, causal", seq_q = 2, seq_k = 6, dim = 3, causal = true },
    { name = "more queries than keys, causal", seq_q = 6, seq_k = 3, dim = 3, causal = true },
    { name = "one key", seq_q = 3, seq_k = 1, dim = 2 },
    { name = "values wider than keys", seq_q = 3, seq_k = 4, dim = 2, dim_v = 5, causal = true },
    { name = "values narrower than keys", seq_q = 3, seq_k = 4, dim = 5, dim_v = 1 },
    { name = "grouped heads", batch = 2, heads = 4, heads_kv = 2, seq_q = 3, seq_k = 3, dim = 2 },
    { name = "grouped heads, causal", batch = 2, heads = 6, heads_kv = 2, seq_q = 3, seq_k = 4, dim = 2, causal = true },
    { name = "a scale", seq_q = 3, seq_k = 4, dim = 3, scale = 0.3 },
    { name = "a negative scale, causal", seq_q = 4, seq_k = 4, dim = 3, scale = -1.7, causal = true },
    { name = "a scale of 0", seq_q = 3, seq_k = 4, dim = 3, scale = 0 },
  }
  local STEP, BOUND = 1e-4, 1e-7 -- central differences: the step's square, times a third derivative of order 1

  for _, row in ipairs(cases) do
    it("for " .. row.name, function()
      local case = attention.case(row)
      local inputs = {}
      for name, tensor in pairs(attention.normal(case)) do inputs[name] = tensor:double() end
      local got = attention.oracle(case, inputs)
      for gradient, name in pairs { dq = "q", dk = "k", dv = "v" } do
        local flat, slopes = inputs[name]:data(), got[gradient]:contiguous()
        for i = 0, slopes:numel() - 1 do
          local x = flat[i]
          flat[i] = x + STEP
          local above = loss(case, inputs)
          flat[i] = x - STEP
          local below = loss(case, inputs)
          flat[i] = x
          close((above - below) / (2 * STEP), slopes:data()[i], BOUND, gradient)
        end
      end
    end)
  end
end)

describe("the naive implementation that 16-bit bounds are made from", function()
  for _, dtype in ipairs { "float16", "bfloat16" } do
    it("rounds as conversion to " .. dtype .. " does", function()
      local case = { name = "rounding" }
      local numbers = cf.randn({ 2000 }, { dtype = "float64", generator = attention.generator(case) })
      local powers = cf.rand({ 2000 }, { dtype = "float64", low = -26, high = 16, generator = attention.generator(case) })
      for i = 1, 2000 do numbers[i] = numbers[i] * 2 ^ powers[i] end
      local rounded = numbers:to(dtype):double()
      for i = 1, 2000 do
        assert.are.equal(rounded[i], attention.round(numbers[i], dtype))
      end
    end)
  end

  it("makes errors that grow as the dtype gets coarser", function()
    local case = attention.case { name = "coarser", seq_q = 20, seq_k = 30, dim = 16 }
    local inputs = attention.make(case, "bfloat16")
    local expected = attention.oracle(case, inputs)
    local half = attention.naive_errors(case, inputs, expected, "float16")
    local brain = attention.naive_errors(case, inputs, expected, "bfloat16")
    for _, name in ipairs { "o", "dq", "dk", "dv" } do
      assert.is_true(half[name] > 1e-4 and half[name] < 1e-2, name)
      assert.is_true(brain[name] > 3 * half[name] and brain[name] < 0.1, name)
    end
  end)
end)
