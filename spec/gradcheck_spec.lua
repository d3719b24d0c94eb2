local cf = require "spec.support.on_device"

describe("gradcheck", function()
  local x = cf.tensor({ { 1, -2 }, { 0.5, 3 } }, { dtype = "f64" })

  it("accepts the right gradient", function()
    local ok, report = cf.gradcheck(function(t) return (t * t * t):sum() end, { x }, { 3 * x * x })
    assert.is_true(ok)
    assert.are.equal(4, report.numel)
    assert.is_true(report.max_rel < 1e-7)
    assert.truthy(tostring(report):find("gradients agree: 4 elements checked", 1, true))
  end)

  it("finds the wrong element, and names it", function()
    local wrong = 3 * x * x
    wrong[{ 2, 1 }] = 1
    local ok, report = cf.gradcheck(function(t) return (t * t * t):sum() end, { x }, { wrong })
    assert.is_false(ok)
    assert.are.equal(1, report.n_bad)
    assert.are.equal(1, report.worst.input)
    assert.are.same({ 2, 1 }, report.worst.index)
    assert.are.equal(1, report.worst.gradient)
    assert.is_near(0.75, report.worst.numeric, 1e-7)
    assert.truthy(tostring(report):find("input 1 at {2, 1}: gradient 1, finite differences 0.75", 1, true))
    wrong[{ 2, 1 }] = 0 / 0
    assert.is_false((cf.gradcheck(function(t) return (t * t * t):sum() end, { x }, { wrong })))
  end)

  it("checks several inputs, of any dtype and strides, and skips those marked false", function()
    local y = cf.tensor({ { 4, 5 }, { 6, 7 } }, { dtype = "f16" }):transpose(1, 2)
    local function f(a, b) return (a * b):sum() end
    assert.is_true((cf.gradcheck(f, { x, y }, { y, x })))
    assert.is_false((cf.gradcheck(f, { x, y }, { x, x })))
    local ok, report = cf.gradcheck(f, { x, y }, { false, x })
    assert.is_true(ok)
    assert.are.equal(4, report.numel)
    assert.tensor(y, { { 4, 6 }, { 5, 7 } }, "float16") -- the inputs themselves are not touched
  end)

  it("moves one element at a time", function()
    -- bilinear, so exact for any step, unless another element is still moved
    local ok, report = cf.gradcheck(function(t) return t[1] * t[2] end, { cf.tensor { 3, 5 } }, { cf.tensor { 5, 3 } }, { eps = 0.5 })
    assert.is_true(ok, tostring(report))
    assert.is_near(0, report.max_abs, 1e-12)
  end)

  it("can look at a part of the elements", function()
    local calls = 0
    local ok, report = cf.gradcheck(function(t)
      calls = calls + 1
      return t:sum(1) -- a tensor of one element will do
    end, { cf.arange(100) }, { cf.ones { 100 } }, { max_elements = 7, eps = 1e-3 })
    assert.is_true(ok)
    assert.are.equal(7, report.numel)
    assert.are.equal(14, calls)
  end)

  for _, causal in ipairs { false, true } do
    it("agrees with the reference's own gradients" .. (causal and ", causal" or ""), function()
      local g = cf.generator(5)
      local function randn(shape) return cf.randn(shape, { dtype = "f64", generator = g }) end
      local q, k, v = randn { 1, 4, 3, 5 }, randn { 1, 2, 4, 5 }, randn { 1, 2, 4, 2 }
      local d_o = randn { 1, 4, 3, 2 }
      local options = { causal = causal, scale = 0.3 }
      local _, ctx = cf.reference.attention(q, k, v, options)
      local ok, report = cf.gradcheck(function(a, b, c)
        return (cf.reference.attention(a, b, c, options) * d_o:cpu()):sum()
      end, { q, k, v }, { ctx:backward(d_o) })
      assert.is_true(ok, tostring(report))
      assert.are.equal(60 + 40 + 16, report.numel)
    end)
  end

  it("refuses what it cannot use", function()
    local function f(t) return t:sum() end
    assert.raises_at_caller(function() cf.gradcheck(1, { x }, { x }) end, "argument 'f'")
    assert.raises_at_caller(function() cf.gradcheck(function() end, { x }, { x }) end, "returns a number, got nil")
    assert.raises_at_caller(function() cf.gradcheck(f, x, { x }) end, "argument 'inputs'")
    assert.raises_at_caller(function() cf.gradcheck(f, { 1 }, { x }) end, "inputs[1]")
    assert.raises_at_caller(function() cf.gradcheck(f, { x }, { x, x }) end, "argument 'grads'")
    assert.raises_at_caller(function() cf.gradcheck(f, { x }, { x[1] }) end, "grads[1]")
    assert.raises_at_caller(function() cf.gradcheck(f, { x }, { x }, { eps = 0 }) end, "argument 'eps'")
    assert.raises_at_caller(function() cf.gradcheck(f, { x }, { x }, { max_elements = 0 }) end, "max_elements")
    assert.raises_at_caller(function() cf.gradcheck(f, { x }, { x }, { epsilon = 1 }) end, "unknown option 'epsilon'")
  end)
end)
