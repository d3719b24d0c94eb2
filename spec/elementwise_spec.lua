local cf = require "spec.support.on_device"
local ffi = require "ffi"

local a, b = cf.tensor { { 1, 2, 3 }, { 4, 5, 6 } }, cf.tensor { 10, 20, 30 }

describe("arithmetic", function()
  it("works element by element, with numbers on both sides", function()
    assert.tensor(a + b, { { 11, 22, 33 }, { 14, 25, 36 } })
    assert.tensor(a - b, { { -9, -18, -27 }, { -6, -15, -24 } })
    assert.tensor(a * b, { { 10, 40, 90 }, { 40, 100, 180 } })
    assert.tensor(b / cf.tensor { 4, 5, 8 }, { 2.5, 4, 3.75 })
    assert.tensor(a + 1, { { 2, 3, 4 }, { 5, 6, 7 } })
    assert.tensor(1 - a, { { 0, -1, -2 }, { -3, -4, -5 } })
    assert.tensor(2 * b, { 20, 40, 60 })
    assert.tensor(60 / b, { 6, 3, 2 })
    assert.tensor(-b, { -10, -20, -30 })
    assert.tensor(b / 0, { math.huge, math.huge, math.huge })
  end)

  it("broadcasts from the right", function()
    local column = cf.tensor { { 100 }, { 200 } }
    assert.tensor(column + b, { { 110, 120, 130 }, { 210, 220, 230 } })
    assert.tensor(cf.tensor(1) + b, { 11, 21, 31 })
    assert.raises_at_caller(function() return a + cf.zeros { 2 } end, "add: shapes [2 x 3] and [2] do not broadcast")
  end)

  local pairs_of_dtypes = {
    { "float32", "float32", "float32" }, { "float16", "float16", "float16" }, { "float16", "bfloat16", "float32" },
    { "bfloat16", "float32", "float32" }, { "float64", "bfloat16", "float64" }, { "float32", "float64", "float64" },
  }
  for _, row in ipairs(pairs_of_dtypes) do
    it(("of %s and %s gives %s"):format(unpack(row)), function()
      assert.are.equal(row[3], (cf.ones({ 2 }, { dtype = row[1] }) + cf.ones({ 2 }, { dtype = row[2] })).dtype)
      assert.are.equal(row[3], (cf.ones({ 2 }, { dtype = row[2] }) * cf.ones({ 2 }, { dtype = row[1] })).dtype)
      assert.are.equal(row[1], (cf.ones({ 2 }, { dtype = row[1] }) + 1).dtype)
    end)
  end

  it("rounds once", function()
    local x, y = 1.1, 3.3
    local function f32(value) return tonumber(ffi.new("float[1]", value)[0]) end
    assert.tensor(cf.tensor { x } / cf.tensor { y }, { f32(f32(x) / f32(y)) })
    assert.tensor(cf.tensor({ x }, { dtype = "f64" }) / cf.tensor({ y }, { dtype = "f64" }), { x / y })
    assert.tensor(cf.tensor({ 2048 }, { dtype = "f16" }) + 1, { 2048 }) -- a tie, to even
    assert.tensor(cf.tensor({ 2050 }, { dtype = "f16" }) + 1, { 2052 })
  end)

  it("works in place", function()
    local t = a:clone()
    assert.are.equal(t, t:add_(b))
    assert.are.equal(t, t:sub_(1))
    assert.are.equal(t, t:mul_(2))
    assert.tensor(t, { { 20, 42, 64 }, { 26, 48, 70 } })
    t:div_(cf.tensor { { 2 }, { 1 } })
    assert.tensor(t, { { 10, 21, 32 }, { 26, 48, 70 } })
    t:add_(t)
    assert.tensor(t, { { 20, 42, 64 }, { 52, 96, 140 } })
    assert.raises_at_caller(function() t:add_(cf.zeros { 2, 2, 3 }) end, "broadcasts to [2 x 3], got [2 x 2 x 3]")
    local h = cf.ones({ 1 }, { dtype = "f16" })
    h:add_(cf.tensor({ 0.5 }, { dtype = "f64" }))
    assert.tensor(h, { 1.5 }, "float16")
  end)

  it("works in place on overlapping views", function()
    local t = cf.arange(4)
    t:narrow(1, 2, 3):add_(t:narrow(1, 1, 3))
    assert.tensor(t, { 1, 3, 5, 7 })
    local square = cf.tensor { { 1, 2 }, { 3, 4 } }
    square:copy_(square:transpose(1, 2))
    assert.tensor(square, { { 1, 3 }, { 2, 4 } })
  end)

  it("works on views of any strides", function()
    local t = cf.arange(6):view({ 2, 3 }):transpose(1, 2)
    assert.tensor(t + t, { { 2, 8 }, { 4, 10 }, { 6, 12 } })
    assert.tensor(t[{ {}, 2 }] * 10, { 40, 50, 60 })
  end)

  it("has functions, and the larger and smaller of two", function()
    local t = cf.tensor({ 1, 4 }, { dtype = "f64" })
    assert.tensor(t:sqrt(), { 1, 2 })
    -- the last bit of these is the mathematical library's
    assert.is_true((cf.all_close(t:exp(), cf.tensor({ math.exp(1), math.exp(4) }, { dtype = "f64" }), { rtol = 2 ^ -52, atol = 0 })))
    assert.is_true((cf.all_close(t:log(), cf.tensor({ 0, math.log(4) }, { dtype = "f64" }), { rtol = 2 ^ -52, atol = 0 })))
    assert.tensor((-t):abs(), { 1, 4 })
    assert.tensor(cf.maximum(t, 2), { 2, 4 })
    assert.tensor(cf.minimum(2, t), { 1, 2 })
    assert.tensor(t:maximum(cf.tensor { 3, 3 }), { 3, 4 }, "float64")
    assert.tensor(cf.maximum(cf.tensor { 0 / 0, 1 }, cf.tensor { 1, 0 / 0 }), { 0 / 0, 0 / 0 })
    for _, name in ipairs { "abs_", "exp_", "log_", "sqrt_" } do
      local u = t:clone()
      assert.are.equal(u, u[name](u))
      assert.tensor(u, t[name:sub(1, -2)](t):totable())
    end
  end)

  it("does not order tensors", function()
    assert.raises_at_caller(function() return a < b end, "no order")
    assert.raises_at_caller(function() return a <= b end, "no order")
  end)
end)

describe("a reduction", function()
  it("of everything is a Lua number", function()
    assert.are.equal(21, a:sum())
    assert.are.equal(3.5, a:mean())
    assert.are.equal(6, a:max())
    assert.are.equal(1, a:min())
    assert.are.equal(5, cf.tensor(5):sum())
    local t = cf.tensor { 1, 0 / 0, 3 }
    for _, name in ipairs { "sum", "mean", "max", "min" } do
      local value = t[name](t)
      assert.is_true(value ~= value, name)
    end
  end)

  it("of a dimension is a tensor", function()
    assert.tensor(a:sum(1), { 5, 7, 9 })
    assert.tensor(a:sum(-1), { 6, 15 })
    assert.tensor(a:mean(2, { keepdim = true }), { { 2 }, { 5 } })
    assert.tensor(a:max(1, { keepdim = true }), { { 4, 5, 6 } })
    assert.tensor(a:min(2), { 1, 4 })
    assert.tensor(b:sum(1), 60)
    assert.are.equal("float16", a:half():sum(1).dtype)
    assert.tensor(a:transpose(1, 2):sum(1), { 6, 15 })
  end)

  it("is summed in float64", function()
    assert.are.equal(2 ^ 25 + 1, cf.tensor { 2 ^ 25, 1 }:sum()) -- float32 would lose the 1
    local many = cf.full({ 3000 }, 1, { dtype = "f16" })
    assert.are.equal(3000, many:sum())
  end)

  it("takes keepdim only with a dimension", function()
    assert.raises_at_caller(function() a:sum(nil, { keepdim = true }) end, "unknown option 'keepdim'")
  end)
end)
