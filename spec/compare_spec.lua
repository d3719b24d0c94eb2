local cf = require "spec.support.on_device"

describe("all_close", function()
  it("allows atol + rtol * |expected|", function()
    local a, b = cf.tensor { 1, 2, 100 }, cf.tensor { 1, 2.5, 101 }
    assert.is_false((cf.all_close(a, b)))
    assert.is_true((cf.all_close(a, b, { atol = 1 })))
    assert.is_false((cf.all_close(a, b, { atol = 0.9 })))
    assert.is_true((cf.all_close(a, b, { rtol = 0.2, atol = 0 })))
    assert.is_false((cf.all_close(a, b, { rtol = 0.19, atol = 0 })))
  end)

  it("reports what it found, counting from 1", function()
    local a = cf.tensor { { 1, 2, 3 }, { 4, 5, 6 } }
    local b = cf.tensor { { 1, 2, 3 }, { 4, 4, 6.5 } }
    local ok, report = cf.all_close(a, b, { rtol = 0, atol = 0.75 })
    assert.is_false(ok)
    assert.are.equal(6, report.numel)
    assert.are.equal(1, report.n_bad)
    assert.are.equal(1, report.max_abs)
    assert.are.equal(0.25, report.max_rel)
    assert.is_near(math.sqrt(1.25) / math.sqrt(1 + 4 + 9 + 16 + 16 + 6.5 ^ 2), report.rel_norm, 1e-12)
    assert.are.same({ 2, 2 }, report.worst_index)
    assert.are.equal(5, report.worst_actual)
    assert.are.equal(4, report.worst_expected)
    assert.are.equal("not close: 1 of 6 elements differ by more than 0.75 + 0 * |expected|; worst at {2, 2}: got 5, "
      .. "expected 4; relative error 0.119 (in norm), largest difference 1", tostring(report))
    assert.are.equal("close: 6 elements, relative error 0 (in norm), largest difference 0",
      tostring(select(2, cf.all_close(a, a))))
  end)

  it("takes its tolerance from the less precise dtype", function()
    local x = cf.tensor({ 1 }, { dtype = "f64" })
    local by_dtype = { { "f64", 1e-8, 1e-6 }, { "f32", 5e-6, 5e-5 }, { "f16", 9e-4, 5e-3 }, { "bf16", 1e-2, 5e-2 } }
    for _, row in ipairs(by_dtype) do
      local y = cf.tensor({ 1 }, { dtype = row[1] })
      assert.is_true((cf.all_close(x + row[2], y)), row[1])
      assert.is_true((cf.all_close(y, x + row[2])), row[1])
      assert.is_false((cf.all_close(x + row[3], y)), row[1])
    end
  end)

  it("does not let NaN pass", function()
    local nan, one, inf = cf.tensor { 0 / 0 }, cf.tensor { 1 }, cf.tensor { math.huge }
    assert.is_false((cf.all_close(nan, one, { rtol = 1e300, atol = 1e300 })))
    assert.is_false((cf.all_close(one, nan, { rtol = 1e300 })))
    assert.is_false((cf.all_close(nan, nan)))
    assert.is_true((cf.all_close(nan, nan, { equal_nan = true })))
    assert.is_true((cf.all_close(inf, inf)))
    assert.is_false((cf.all_close(inf, -inf)))
    assert.is_false((cf.all_close(one, inf, { rtol = 1e300, atol = 1e300 })))
    local _, report = cf.all_close(nan, one)
    assert.is_true(report.max_abs ~= report.max_abs)
    assert.are.equal(1, report.n_bad)
  end)

  it("wants one shape", function()
    assert.raises_at_caller(function() cf.all_close(cf.zeros { 2 }, cf.zeros { 2, 1 }) end,
      "all_close: argument 'expected': expected the shape of 'actual', [2], got [2 x 1]")
    assert.raises_at_caller(function() cf.all_close(cf.zeros { 2 }, cf.zeros { 2 }, { rtol = -1 }) end, "argument 'rtol'")
  end)
end)

describe("equal", function()
  it("compares shape and values", function()
    assert.is_true(cf.equal(cf.arange(3), cf.arange(3, { dtype = "f16" })))
    assert.is_false(cf.equal(cf.arange(3), cf.arange(4)))
    assert.is_false(cf.equal(cf.zeros { 1, 3 }, cf.zeros { 3 }))
    assert.is_false(cf.equal(cf.tensor { 0 / 0 }, cf.tensor { 0 / 0 }))
    assert.is_false(cf.equal(cf.tensor({ 1 }, { dtype = "f64" }), cf.tensor({ 1 + 2 ^ -52 }, { dtype = "f64" })))
  end)
end)
