local cf = require "spec.support.on_device"

describe("random numbers", function()
  it("are the same for the same seed", function()
    for _, name in ipairs { "rand", "randn" } do
      cf.manual_seed(42)
      local first, second = cf[name] { 3, 5 }, cf[name] { 3, 5 }
      cf.manual_seed(42)
      assert.is_true(cf.equal(first, cf[name] { 3, 5 }), name)
      assert.is_true(cf.equal(second, cf[name] { 3, 5 }), name)
      assert.is_false(cf.equal(first, second), name)
      cf.manual_seed(43)
      assert.is_false(cf.equal(first, cf[name] { 3, 5 }), name)
    end
  end)

  it("come from a generator of one's own", function()
    local g, h = cf.generator(7), cf.generator(7)
    cf.manual_seed(1)
    local expected = cf.randn { 4 }
    cf.manual_seed(1)
    local a = cf.randn({ 100 }, { generator = g })
    assert.is_true(cf.equal(a, cf.randn({ 100 }, { generator = h })))
    assert.is_true(cf.equal(expected, cf.randn { 4 })) -- the default generator did not move
    assert.are.equal(7, g:seed())
    assert.is_true(g:offset() > 0)
    local copy = g:clone()
    assert.is_true(cf.equal(cf.rand({ 9 }, { generator = g }), cf.rand({ 9 }, { generator = copy })))
    g:manual_seed(7)
    assert.are.equal(0, g:offset())
    assert.is_true(cf.equal(a, cf.randn_like(a, { generator = g })))
    assert.are.equal("[cf.Generator seed 7 offset 0]", tostring(cf.generator(7)))
    assert.are.equal(5, cf.generator(5ULL):seed())
  end)

  it("do not depend on strides or the number of threads", function()
    local threads = cf.num_threads()
    local g = cf.generator(3)
    local a = cf.randn({ 301, 77 }, { generator = g })
    cf.num_threads(1)
    g:manual_seed(3)
    assert.is_true(cf.equal(a, cf.randn({ 301, 77 }, { generator = g })))
    cf.num_threads(threads)
    -- element i gets the i-th number: a shorter tensor gets the same first ones
    g:manual_seed(3)
    assert.is_true(cf.equal(a:view({ -1 }):narrow(1, 1, 1001), cf.randn({ 1001 }, { generator = g })))
  end)

  it("are uniform in [low, high)", function()
    local t = cf.rand({ 100000 }, { dtype = "f64", generator = cf.generator(1) })
    assert.is_true(t:min() >= 0 and t:max() < 1)
    assert.is_near(0.5, t:mean(), 0.005)              -- 5 standard errors
    assert.is_near(1 / 12, ((t - t:mean()) * (t - t:mean())):mean(), 0.0015)
    local u = cf.rand({ 1000 }, { low = -2, high = 6 })
    assert.is_true(u:min() >= -2 and u:min() < -1.5 and u:max() < 6 and u:max() > 5.5)
    local h = cf.rand({ 100000 }, { dtype = "f16" }) -- rounding must not reach high
    assert.is_true(h:max() < 1)
  end)

  it("are normal with a mean and a standard deviation", function()
    local t = cf.randn({ 100000 }, { dtype = "f64", generator = cf.generator(1) })
    assert.is_near(0, t:mean(), 0.016)
    assert.is_near(1, (t * t):mean(), 0.023)
    assert.is_near(0, (t * t * t):mean(), 0.07)
    assert.is_near(3, (t * t * t * t):mean(), 0.2)
    local u = cf.randn({ 10000 }, { mean = 100, std = 0.5 })
    assert.is_near(100, u:mean(), 0.03)
    assert.tensor(cf.randn({ 3 }, { mean = 2, std = 0 }), { 2, 2, 2 })
  end)

  it("take options of the right kind only", function()
    assert.raises_at_caller(function() cf.randn({ 2 }, { std = -1 }) end, "std")
    assert.raises_at_caller(function() cf.randn({ 2 }, { low = 1 }) end, "unknown option 'low'")
    assert.raises_at_caller(function() cf.rand({ 2 }, { generator = 5 }) end, "argument 'generator'")
    assert.raises_at_caller(function() cf.rand({ 2 }, { low = 0 / 0 }) end, "argument 'low'")
    for _, seed in ipairs { -1, 1.5, "x", 2 ^ 60 } do
      assert.raises_at_caller(function() cf.manual_seed(seed) end, "argument 'seed'")
      assert.raises_at_caller(function() cf.generator(seed) end, "argument 'seed'")
    end
  end)
end)
