local cf = require "spec.support.on_device"
local helper = require "spec.helper"

-- What cf.attention adds to the C calls: outputs, options and the context. The numbers are checked in attention_*.
describe("attention from Lua", function()
  local generator = cf.generator(11)
  local function randn(...) return cf.randn({ ... }, { generator = generator }) end
  local q, k, v = randn(2, 4, 9, 16), randn(2, 2, 13, 16), randn(2, 2, 13, 24)

  it("gives o, and a context with lse", function()
    local o, ctx = cf.attention(q, k, v, { causal = true, scale = 0.3 })
    local expected, reference = cf.reference.attention(q, k, v, { causal = true, scale = 0.3 })
    assert.are.same({ 2, 4, 9, 24 }, o:shape())
    assert.are.equal("float32", o.dtype)
    assert.are.same({ 2, 4, 9 }, ctx.lse:shape())
    assert.are.equal("float32", ctx.lse.dtype)
    assert.are.equal("float64", expected.dtype)
    assert.are.equal("float64", reference.lse.dtype)
    assert.is_true((cf.all_close(o, expected)))
    assert.is_true((cf.all_close(ctx.lse, reference.lse)))
    assert.are.equal("[cf.Context of attention: q [2 x 4 x 9 x 16], k [2 x 2 x 13 x 16], causal]", tostring(ctx))
    -- a call as the last argument brings its context along, which all_close does not take for options
    assert.is_false((cf.all_close(o, cf.attention(q, k, v, { causal = true })))) -- the scale counts
    assert.is_false((cf.all_close(o, cf.attention(q, k, v, { scale = 0.3 }))))   -- and the mask
  end)

  it("computes gradients, as often as asked", function()
    local o, ctx = cf.attention(q, k, v, { causal = true })
    local d_o = cf.randn_like(o)
    local _, reference = cf.reference.attention(q, k, v, { causal = true })
    local expected = { reference:backward(d_o) }
    for _ = 1, 2 do
      local got = { ctx:backward(d_o) }
      for i = 1, 3 do
        assert.are.same(expected[i]:shape(), got[i]:shape())
        local ok, report = cf.all_close(got[i], expected[i], { rtol = 1e-4 })
        assert.is_true(ok, tostring(report))
      end
    end
  end)

  it("writes to the outputs given", function()
    local o, ctx = cf.attention(q, k, v)
    local out = cf.full({ 2, 4, 9, 24 }, 7)
    local result, second = cf.attention(q, k, v, { out = out })
    assert.are.equal(out, result)
    assert.is_true(cf.equal(o, out))
    local d_o = cf.ones_like(o)
    local dq, dk, dv = ctx:backward(d_o)
    local mine = { dq = cf.empty_like(q), dk = cf.empty_like(k), dv = cf.empty_like(v) }
    local a, b, c = second:backward(d_o, mine)
    assert.are.equal(mine.dq, a)
    assert.are.equal(mine.dk, b)
    assert.are.equal(mine.dv, c)
    assert.is_true(cf.equal(dq, a) and cf.equal(dk, b) and cf.equal(dv, c))
    local none, only, nothing = ctx:backward(d_o, { dq = false, dv = false })
    assert.is_nil(none)
    assert.is_nil(nothing)
    assert.is_true(cf.equal(dk, only))
  end)

  it("takes [batch x seq x heads x dim] memory through a transposed view", function()
    local q2 = q:transpose(2, 3):contiguous():transpose(2, 3)
    assert.is_false(q2:is_contiguous())
    assert.is_true(cf.equal(cf.attention(q, k, v), (cf.attention(q2, k, v))))
  end)

  it("keeps what backward needs when the caller frees it", function()
    local a, b, c = q:clone(), k:clone(), v:clone()
    local o, ctx = cf.attention(a, b, c)
    local d_o = cf.ones_like(o)
    local expected = ctx:backward(d_o)
    for _, t in ipairs { a, b, c, o } do t:free() end
    a, b, c, o = nil, nil, nil, nil -- luacheck: ignore 311
    collectgarbage()
    assert.is_true(cf.equal(expected, (ctx:backward(d_o))))
  end)

  it("gives everything back when the context is freed or collected", function()
    local before = helper.live_storages()
    local o, ctx = cf.attention(q, k, v)
    assert.are.equal(before + 2, helper.live_storages())
    ctx:free()
    ctx:free()
    assert.are.equal(before + 1, helper.live_storages())
    assert.raises_at_caller(function() ctx:backward(o) end, "backward: the context was freed")
    assert.are.equal("[cf.Context freed]", tostring(ctx))
    o:free()
    local function forget() cf.attention(q, k, v) end -- in a frame of its own, which keeps nothing behind
    forget()
    assert.are.equal(before, helper.live_storages())
  end)

  it("takes 16-bit dtypes, and the reference takes any", function()
    for _, dtype in ipairs { "float16", "bfloat16" } do
      local o, ctx = cf.attention(q:to(dtype), k:to(dtype), v:to(dtype))
      assert.are.equal(dtype, o.dtype)
      assert.are.equal("float32", ctx.lse.dtype)
      assert.are.equal(dtype, (ctx:backward(cf.ones_like(o))).dtype)
      assert.are.equal("float64", (cf.reference.attention(q:to(dtype), k:to(dtype), v:to(dtype))).dtype)
    end
    assert.are.equal("float64", (cf.reference.attention(q:double(), k:double(), v:double())).dtype)
  end)

  it("is explained without being run", function()
    local before = helper.live_storages()
    local plan = cf.explain(q, k, v, { causal = true })
    assert.are.equal(before, helper.live_storages())
    assert.truthy(tostring(plan):find("pass: forward\n", 1, true))
    assert.truthy(tostring(plan):find("\n\npass: backward\n", 1, true))
    assert.truthy(plan.forward.kernel:find(helper.device == "cpu" and cf.cpu.isa() or "cuflash_", 1, true))
    assert.truthy(plan.backward.problem:find("causal", 1, true))
    local one = cf.explain(q, k, v, { pass = "backward" })
    assert.is_nil(one.forward)
    assert.are.equal("backward", one.backward.pass)
  end)

  local refused = {
    { "q is no tensor", function() cf.attention(1, k, v) end, "attention: argument 'q': expected a tensor, got 1" },
    { "v is missing", function() cf.attention(q, k) end, "attention: argument 'v': expected a tensor, got nil" },
    { "q has three dimensions", function() cf.attention(q[1], k, v) end, "argument 'q': expected [batch x heads x seq x dim]" },
    { "v has five", function() cf.attention(q, k, v:view { 1, 2, 2, 13, 24 }) end, "argument 'v': expected" },
    { "k has another batch", function() cf.attention(q, k:narrow(1, 1, 1), v) end, "argument 'k': expected [2 x heads x seq x 16]" },
    { "k has another head dimension", function() cf.attention(q, k:narrow(4, 1, 8), v) end, "got [2 x 2 x 13 x 8]" },
    { "k and v have different lengths", function() cf.attention(q, k, v:narrow(3, 1, 5)) end, "argument 'v': expected [2 x 2 x 13 x dim]" },
    { "the heads do not divide", function() cf.attention(q:narrow(2, 1, 3), k, v) end, "divides the 3 heads" },
    { "the dtypes differ", function() cf.attention(q, k:half(), v) end, "argument 'k': expected float32" },
    { "the dtype is float64", function() cf.attention(q:double(), k:double(), v:double()) end, "float64" },
    { "the last dimension is not contiguous", function() cf.attention(q:transpose(3, 4), q:transpose(3, 4), q) end, "attention: argument" },
    { "an option is unknown", function() cf.attention(q, k, v, { casual = true }) end,
      "attention: unknown option 'casual' (did you mean 'causal'?)" },
    { "the options are no table", function() cf.attention(q, k, v, true) end, "argument 'options': expected a table" },
    { "causal is no boolean", function() cf.attention(q, k, v, { causal = 1 }) end, "argument 'causal': expected true or false, got 1" },
    { "scale is NaN", function() cf.attention(q, k, v, { scale = 0 / 0 }) end, "argument 'scale': expected a finite number" },
    { "scale is text", function() cf.attention(q, k, v, { scale = "1" }) end, "argument 'scale': expected a number, got '1'" },
    { "scale is beyond float32", function() cf.attention(q, k, v, { scale = 1e300 }) end, "argument 'scale'" },
    { "out is no tensor", function() cf.attention(q, k, v, { out = {} }) end, "argument 'out': expected a tensor" },
    { "out has another shape", function() cf.attention(q, k, v, { out = cf.zeros { 2, 4, 9, 16 } }) end,
      "expected [2 x 4 x 9 x 24], got [2 x 4 x 9 x 16]" },
    { "out has another dtype", function() cf.attention(q, k, v, { out = cf.zeros({ 2, 4, 9, 24 }, { dtype = "f16" }) }) end, "float16" },
    { "out is expanded", function() cf.attention(q, k, v, { out = cf.zeros({ 24 }):expand { 2, 4, 9, 24 } }) end, "expanded" },
    { "out is an input", function() cf.attention(q, q, q, { out = q }) end, "overlaps" },
    { "the pass is unknown", function() cf.explain(q, k, v, { pass = "both" }) end, "argument 'pass'" },
    { "the reference is asked for determinism", function() cf.reference.attention(q, k, v, { deterministic = true }) end,
      "reference.attention: unknown option 'deterministic' (it takes 'causal', " },
  }
  for _, case in ipairs(refused) do
    it("is refused where " .. case[1], function()
      local before = helper.live_storages()
      assert.raises_at_caller(case[2], case[3])
      assert.are.equal(before, helper.live_storages())
    end)
  end

  it("gives its outputs back at once when it is refused", function()
    local _, ctx = cf.attention(q, k, v)
    local short = v:narrow(3, 1, 5)
    helper.live_storages()
    collectgarbage("stop") -- not even the collector is needed
    local before = cf.memory_stats().live_storages
    pcall(cf.attention, q, k, short)
    pcall(ctx.backward, ctx, q)
    local after = cf.memory_stats().live_storages
    collectgarbage("restart")
    assert.are.equal(before, after)
  end)

  it("refuses a wrong gradient", function()
    local o, ctx = cf.attention(q, k, v)
    local before = helper.live_storages()
    assert.raises_at_caller(function() ctx:backward() end, "backward: argument 'd_o': expected a tensor, got nil")
    assert.raises_at_caller(function() ctx:backward(q) end, "argument 'd_o': expected [2 x 4 x 9 x 24]")
    assert.raises_at_caller(function() ctx:backward(o:half()) end, "argument 'd_o': expected float32")
    assert.raises_at_caller(function() ctx:backward(o, { dq = k }) end, "argument 'dq': expected [2 x 4 x 9 x 16]")
    assert.raises_at_caller(function() ctx:backward(o, { dk = true }) end, "argument 'dk': expected a tensor, got true")
    assert.raises_at_caller(function() ctx:backward(o, { do_ = o }) end, "unknown option 'do_'")
    assert.raises_at_caller(function() ctx.backward(o) end, "called as ctx:backward")
    assert.are.equal(before, helper.live_storages())
    assert.are.same({ 2, 4, 9, 16 }, (ctx:backward(o)):shape())
  end)
end)
