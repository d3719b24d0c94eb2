local cf = require "spec.support.on_device"
local helper = require "spec.helper"

describe("memory", function()
  local soft = cf.memory_soft_limit()

  after_each(function()
    cf.memory_limit(helper.device, 0)
    cf.memory_soft_limit(soft)
    collectgarbage("restart")
  end)

  it("is counted", function()
    helper.live_storages()
    local before = cf.memory_stats()
    local t = cf.zeros { 1000 }
    local after = cf.memory_stats(helper.device)
    assert.are.equal(before.live_bytes + 4000, after.live_bytes)
    assert.are.equal(before.live_storages + 1, after.live_storages)
    assert.are.equal(before.total_storages + 1, after.total_storages)
    assert.is_true(after.peak_bytes >= after.live_bytes)
    t:free()
    cf.memory_reset_peak()
    local now = cf.memory_stats()
    assert.are.equal(before.live_bytes, now.live_bytes)
    assert.are.equal(now.live_bytes, now.peak_bytes)
  end)

  it("is collected past the soft limit", function()
    helper.live_storages()
    collectgarbage("stop") -- or the collector may come by itself
    local base = cf.memory_stats().live_bytes
    cf.memory_soft_limit(base + 10 * 4096)
    cf.memory_reset_peak()
    for _ = 1, 100 do
      cf.zeros { 1024 }
      collectgarbage("stop") -- a collection starts it again
    end
    assert.is_true(cf.memory_stats().peak_bytes <= base + 10 * 4096)
    assert.are.equal(base + 10 * 4096, cf.memory_soft_limit()) -- no reason to grow
  end)

  it("raises the soft limit while it is really in use", function()
    helper.live_storages()
    local base = cf.memory_stats().live_bytes
    local start = base + 10 * 4096
    cf.memory_soft_limit(start)
    local kept = {}
    for i = 1, 40 do kept[i] = cf.zeros { 1024 } end
    local limit = cf.memory_soft_limit()
    assert.is_true(limit > base + 40 * 4096)
    assert.is_true(limit < (base + 40 * 4096) / 0.8 * 1.4 + 1)
    assert.are.equal(40, #kept)
  end)

  it("is collected and asked for again where a limit is reached", function()
    helper.live_storages()
    collectgarbage("stop")
    local base = cf.memory_stats().live_bytes
    cf.memory_limit(helper.device, base + 5 * 4096)
    for _ = 1, 50 do
      assert.tensor(cf.zeros({ 1024 })[{ { 1, 1 } }], { 0 })
      collectgarbage("stop")
    end
  end)

  it("that cannot be had is an error, after which all is as before", function()
    local before = helper.live_storages()
    local base = cf.memory_stats().live_bytes
    local q = cf.randn { 1, 2, 64, 32 }
    cf.memory_limit(helper.device, base + q:numel() * 4 + 1000)
    assert.raises_at_caller(function() cf.zeros { 1024, 1024 } end, "zeros: cannot allocate 4.00 MiB on " .. helper.device_name)
    assert.raises_at_caller(function() cf.randn { 1024 } end, "randn: cannot allocate")
    assert.raises_at_caller(function() q:clone() end, "clone: cannot allocate")
    assert.raises_at_caller(function() return q + q end, "add: cannot allocate")
    assert.raises_at_caller(function() q:transpose(2, 3):reshape { -1 } end, "cannot allocate")
    assert.raises_at_caller(function() q:to("f64") end, "to: cannot allocate")
    assert.raises_at_caller(function() cf.attention(q, q, q) end, "attention: cannot allocate")
    local values = {}
    for i = 1, 1000 do values[i] = i end
    assert.raises_at_caller(function() cf.tensor(values) end, "tensor: cannot allocate")
    assert.are.equal(before + 1, helper.live_storages())
    cf.memory_limit(helper.device, 0)
    assert.are.equal(1024, cf.ones({ 1024 }):sum())
    local o = cf.attention(q, q, q)
    assert.are.same({ 1, 2, 64, 32 }, o:shape())
  end)

  it("runs out at every step of an attention call, without a leak", function()
    local q = cf.randn { 1, 2, 64, 32 }
    local d_o = cf.ones_like(q)
    local function step()
      local o, ctx = cf.attention(q, q, q)
      local dq, dk, dv = ctx:backward(d_o)
      ctx:free()
      for _, t in ipairs { o, dq, dk, dv } do t:free() end
    end
    local before = helper.live_storages()
    local base = cf.memory_stats().live_bytes
    cf.memory_reset_peak()
    step()
    local needed = cf.memory_stats().peak_bytes - base
    local failures = 0
    for limit = 1, needed + 4096, 4096 do
      cf.memory_limit(helper.device, base + limit)
      local ok, message = pcall(step)
      if not ok then
        failures = failures + 1
        assert.truthy(message:find("cannot allocate", 1, true), message)
      end
      assert.are.equal(before, helper.live_storages())
      assert.are.equal(base, cf.memory_stats().live_bytes)
    end
    assert.is_true(failures > 10)
    step()
  end)

  it("limits are refused where they make no sense", function()
    for _, bytes in ipairs { -1, 0.5, 0 / 0, math.huge, "1" } do
      assert.raises_at_caller(function() cf.memory_limit("cpu", bytes) end, "argument 'bytes'")
      assert.raises_at_caller(function() cf.memory_soft_limit(bytes) end, "argument 'bytes'")
    end
    assert.raises_at_caller(function() cf.memory_limit(1000) end, "argument 'device'")
    assert.raises_at_caller(function() cf.memory_limit(nil, 1000) end, "argument 'device'")
    assert.raises_at_caller(function() cf.memory_soft_limit(0) end, "argument 'bytes'")
  end)
end)
