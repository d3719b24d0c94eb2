local cf = require "spec.support.on_device"

local function count() return cf.arange(24):view { 2, 3, 4 } end -- element [i][j][k] is 12 (i-1) + 4 (j-1) + k

describe("an index", function()
  it("selects from the first dimension", function()
    local t = count()
    assert.tensor(t[2], { { 13, 14, 15, 16 }, { 17, 18, 19, 20 }, { 21, 22, 23, 24 } })
    assert.tensor(t[-1][-1], { 21, 22, 23, 24 })
    assert.are.equal(7, t[1][2][3])
    assert.are.equal(24, t[-1][-1][-1])
    assert.are.equal(7, t[1LL][2LL][3LL])
  end)

  it("takes a table of numbers and ranges", function()
    local t = count()
    assert.are.equal(24, t[{ 2, 3, 4 }])
    assert.are.equal(24, t[{ -1, -1, -1 }])
    assert.tensor(t[{ 1, {}, { 2, 3 } }], { { 2, 3 }, { 6, 7 }, { 10, 11 } })
    assert.tensor(t[{ {}, 2, { -2, -1 } }], { { 7, 8 }, { 19, 20 } })
    assert.tensor(t[{ {}, { 2, 2 } }], { { { 5, 6, 7, 8 } }, { { 17, 18, 19, 20 } } })
    assert.tensor(t[{ 2, 1 }], { 13, 14, 15, 16 })
    assert.tensor(t[{}], t:totable())
    assert.are.equal(3, cf.tensor(3)[{}])
  end)

  it("gives views that share memory", function()
    local t = count()
    t[1][1]:fill_(0)
    assert.are.equal(0, t[{ 1, 1, 4 }])
    t:free()
  end)

  it("is assigned a number, a tensor or tables", function()
    local t = cf.zeros { 2, 3 }
    t[1] = 5
    assert.tensor(t, { { 5, 5, 5 }, { 0, 0, 0 } })
    t[{ {}, { 2, 3 } }] = cf.tensor { { 1, 2 }, { 3, 4 } }
    assert.tensor(t, { { 5, 1, 2 }, { 0, 3, 4 } })
    t[{ 2, 1 }] = -1
    t[{ 1, -1 }] = cf.tensor(9)
    assert.tensor(t, { { 5, 1, 9 }, { -1, 3, 4 } })
    t[2] = { 7, 8, 9 }
    t[{ {}, 1 }] = { 0 }
    assert.tensor(t, { { 0, 1, 9 }, { 0, 8, 9 } })
    t[{}] = 1
    assert.tensor(t, { { 1, 1, 1 }, { 1, 1, 1 } })
    local v = cf.zeros { 3 }
    v[2] = 4
    assert.tensor(v, { 0, 4, 0 })
    local s = cf.tensor(1)
    s[{}] = 6
    assert.are.equal(6, s:item())
  end)

  it("is refused outside of the tensor", function()
    local t = count()
    assert.raises_at_caller(function() return t[0] end, "index: dimension 1: expected an index, 1 to 2 or -2 to -1, got 0")
    assert.raises_at_caller(function() return t[3] end, "got 3")
    assert.raises_at_caller(function() return t[-3] end, "got -3")
    assert.raises_at_caller(function() return t[1.5] end, "got 1.5")
    assert.raises_at_caller(function() return t[0 / 0] end, "dimension 1")
    assert.raises_at_caller(function() return t[{ 1, 4 }] end, "dimension 2: expected an index, 1 to 3")
    assert.raises_at_caller(function() return t[{ 1, 1, 1, 1 }] end, "at most 3 entries")
    assert.raises_at_caller(function() return t[{ { 2, 1 } }] end, "first <= last")
    assert.raises_at_caller(function() return t[{ { 1, 3 } }] end, "last of dimension 1")
    assert.raises_at_caller(function() return t[{ { 1 } }] end, "{first, last}")
    assert.raises_at_caller(function() return t[{ { first = 1 } }] end, "{first, last}")
    assert.raises_at_caller(function() return t[{ 1, "2" }] end, "got '2'")
    assert.raises_at_caller(function() return t[true] end, "got true")
    assert.raises_at_caller(function() t[3] = 1 end, "got 3")
    assert.raises_at_caller(function() t[1] = "x" end, "argument 'value'")
    assert.raises_at_caller(function() t[1] = nil end, "argument 'value'")
    assert.raises_at_caller(function() t[1] = cf.zeros { 5 } end, "broadcasts to [3 x 4], got [5]")
    assert.raises_at_caller(function() t[{ 1, 1, 1 }] = cf.zeros { 2 } end, "broadcasts to []")
    assert.raises_at_caller(function() t[1] = { 1, "a" } end, "expected a number at [2]")
    assert.raises_at_caller(function() cf.zeros({ 1 }):expand({ 3 })[1] = 1 end, "expanded")
    assert.raises_at_caller(function() return cf.tensor(1)[1] end, ":item()")
    assert.tensor(t, count():totable()) -- nothing was written
  end)
end)

describe("an index of nil", function()
  it("is refused, and writes nothing", function()
    local t = cf.ones { 2, 2 }
    for _, key in ipairs { "nothing", "gap" } do
      local index = key == "gap" and { 1, nil, 2 } or nil
      assert.has_error(function() return t[index] end)
      assert.has_error(function() t[index] = 0 end)
    end
    assert.are.equal(4, t:sum())
  end)
end)

describe("a tensor", function()
  it("says which operators it lacks", function()
    local t = cf.ones { 2 }
    for _, f in ipairs { function() return t ^ 2 end, function() return t % 2 end, function() return t(1) end } do
      local ok, message = pcall(f)
      assert.is_false(ok)
      assert.matches("tensor", message)
    end
  end)
end)

describe("a view", function()
  it("narrows", function()
    assert.tensor(count():narrow(3, 2, 2):narrow(1, -1, 1), { { { 14, 15 }, { 18, 19 }, { 22, 23 } } })
    assert.tensor(count():narrow(-2, 3, 1)[1], { { 9, 10, 11, 12 } })
  end)

  it("selects", function()
    assert.tensor(count():select(3, -1), { { 4, 8, 12 }, { 16, 20, 24 } })
    assert.tensor(cf.arange(3):select(1, 2), 2)
  end)

  it("transposes", function()
    local t = count():transpose(1, -1)
    assert.are.same({ 4, 3, 2 }, t:shape())
    assert.is_false(t:is_contiguous())
    assert.are.equal(18, t[{ 2, 2, 2 }])
    assert.are.equal(18, t:contiguous()[{ 2, 2, 2 }])
    assert.is_true(t:contiguous():is_contiguous())
    local u = count()
    assert.are.equal(u, u:contiguous())
  end)

  it("reshapes without a copy where the strides allow it", function()
    local t = count()
    local v = t:view { 6, -1 }
    assert.are.same({ 6, 4 }, v:shape())
    v[{ 6, 4 }] = 0
    assert.are.equal(0, t[{ 2, 3, 4 }])
    assert.tensor(cf.tensor { { 5 } }:view {}, 5)
    assert.tensor(cf.tensor(5):view { 1, 1 }, { { 5 } })
    local heads = count():transpose(1, 2):view { 3, 2, 2, 2 }
    assert.are.equal(14, heads[{ 1, 2, 1, 2 }])
    assert.raises_at_caller(function() count():transpose(1, 2):view { 24 } end, "use :reshape")
  end)

  it("reshapes with a copy where it must", function()
    local t = count()
    local shared = t:reshape { 24 }
    shared[1] = 100
    assert.are.equal(100, t[{ 1, 1, 1 }])
    local copied = t:transpose(1, 3):reshape { -1 }
    assert.are.same({ 100, 13, 5, 17 }, copied:narrow(1, 1, 4):totable())
    copied[1] = 0
    assert.are.equal(100, t[{ 1, 1, 1 }])
  end)

  it("expands", function()
    local t = cf.tensor { { 1 }, { 2 } }
    assert.tensor(t:expand { 2, 3 }, { { 1, 1, 1 }, { 2, 2, 2 } })
    assert.tensor(t:expand { 2, -1, 2 }, { { { 1, 1 }, { 2, 2 } }, { { 1, 1 }, { 2, 2 } } })
    assert.raises_at_caller(function() t:expand { 3, 2 } end, "[2 x 1] does not expand to [3 x 2]")
    assert.raises_at_caller(function() t:expand { 2 } end, "does not expand")
    assert.raises_at_caller(function() t:expand { -1, 2, 1 } end, "does not expand")
    assert.raises_at_caller(function() t:expand({ 2, 3 }):fill_(0) end, "dimension 2 is expanded")
  end)

  it("keeps the memory alive by an alias", function()
    local t = cf.arange(3)
    local other = t:alias()
    t:free()
    assert.tensor(other, { 1, 2, 3 })
  end)

  it("is refused for sizes that do not fit", function()
    assert.raises_at_caller(function() count():view { 5, 5 } end, "[5 x 5] does not hold the 24 elements of [2 x 3 x 4]")
    assert.raises_at_caller(function() count():view { 7, -1 } end, "does not hold")
    assert.raises_at_caller(function() count():view { -1, -1 } end, "only one size may be -1")
    assert.raises_at_caller(function() count():reshape { 0, -1 } end, "at [1]")
    assert.raises_at_caller(function() count():narrow(1, 2, 2) end, "argument 'length': expected a whole number from 1 to 1")
  end)
end)
