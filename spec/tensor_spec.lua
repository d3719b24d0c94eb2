local cf = require "spec.support.on_device"
local ffi = require "ffi"
local helper = require "spec.helper"

describe("a tensor", function()
  it("is made of nested tables", function()
    assert.tensor(cf.tensor { { 1, 2, 3 }, { 4, 5, 6 } }, { { 1, 2, 3 }, { 4, 5, 6 } }, "float32")
    assert.tensor(cf.tensor(2.5), 2.5)
    assert.tensor(cf.tensor { { { 7 } } }, { { { 7 } } })
  end)

  it("is made of a constant, or of a range with both ends", function()
    assert.tensor(cf.zeros { 2, 2 }, { { 0, 0 }, { 0, 0 } })
    assert.tensor(cf.ones { 3 }, { 1, 1, 1 })
    assert.tensor(cf.full({ 2 }, -1.5), { -1.5, -1.5 })
    assert.tensor(cf.arange(4), { 1, 2, 3, 4 })
    assert.tensor(cf.arange(0, 1, 0.25), { 0, 0.25, 0.5, 0.75, 1 })
    assert.tensor(cf.arange(3, 1, -1, { dtype = "f64" }), { 3, 2, 1 }, "float64")
    assert.tensor(cf.arange(2, { dtype = "f16" }), { 1, 2 }, "float16")
    assert.are.equal(11, cf.arange(0, 1, 0.1):numel()) -- although 10 * 0.1 is not reached exactly
    assert.are.equal(4, cf.arange(1, 4.9):numel())
  end)

  it("takes the shape, dtype and device of another", function()
    local t = cf.zeros({ 2, 3 }, { dtype = "bf16" })
    for _, name in ipairs { "empty_like", "zeros_like", "ones_like", "rand_like", "randn_like" } do
      local u = cf[name](t)
      assert.are.same({ 2, 3 }, u:shape(), name)
      assert.are.equal("bfloat16", u.dtype, name)
    end
    assert.tensor(cf.ones_like(t, { dtype = "double" }), { { 1, 1, 1 }, { 1, 1, 1 } }, "float64")
  end)

  it("knows its shape, strides, dtype and device", function()
    local t = cf.zeros({ 2, 3, 4 }, { dtype = "float16" })
    assert.are.same({ 2, 3, 4 }, t:shape())
    assert.are.equal("[2 x 3 x 4]", tostring(t:shape()))
    assert.are.equal(3, t:dim())
    assert.are.equal(24, t:numel())
    assert.are.same({ 2, 3, 4 }, { t:size(1), t:size(2), t:size(-1) })
    assert.are.same({ 12, 4, 1 }, { t:stride(1), t:stride(-2), t:stride(3) })
    assert.are.equal("float16", t.dtype)
    assert.are.equal(helper.device_name, t.device)
    assert.is_true(t:is_contiguous())
    assert.are.equal(2, #t)
    assert.are.equal(0, cf.tensor(1):dim())
    assert.are.equal(1, cf.tensor(1):numel())
  end)

  local dtypes = {
    { "float32", { "f32", "float", "float32", "FLOAT32" }, "float *" },
    { "float16", { "f16", "half" }, "uint16_t *" },
    { "bfloat16", { "bf16", "bfloat16" }, "uint16_t *" },
    { "float64", { "f64", "double" }, "double *" },
  }
  for _, row in ipairs(dtypes) do
    it("can be " .. row[1], function()
      for _, alias in ipairs(row[2]) do assert.are.equal(row[1], cf.ones({ 1 }, { dtype = alias }).dtype) end
      local t = cf.ones({ 2 }, { dtype = row[1] })
      assert.is_true(ffi.istype(row[3], t:cpu():data()))
      assert.is_true(ffi.istype(helper.device == "cpu" and row[3] or "void *", t:data()))
      assert.are.equal(0, tonumber(ffi.cast("uintptr_t", t:data()) % 64))
      assert.tensor(t:float(), { 1, 1 }, "float32")
      assert.tensor(t:half(), { 1, 1 }, "float16")
      assert.tensor(t:bfloat16(), { 1, 1 }, "bfloat16")
      assert.tensor(t:double(), { 1, 1 }, "float64")
      assert.tensor(t:to(row[1]), { 1, 1 }, row[1])
      assert.are.equal(t, t:to(row[1])) -- nothing to convert: itself
    end)
  end

  it("rounds to nearest even, once", function()
    local x = cf.tensor({ 1 + 2 ^ -11, 1 + 3 * 2 ^ -11, 65519, 65520, 2 ^ -25, 2 ^ -24 }, { dtype = "f64" })
    assert.tensor(x:half(), { 1, 1 + 2 ^ -9, 65504, math.huge, 0, 2 ^ -24 })
    assert.tensor(cf.tensor({ 1 + 2 ^ -8, 1 + 3 * 2 ^ -8 }, { dtype = "bf16" }), { 1, 1 + 2 ^ -6 })
    -- by way of float32 this would round up twice
    assert.tensor(cf.tensor({ 1 + 2 ^ -11 + 2 ^ -40 }, { dtype = "f16" }), { 1 + 2 ^ -10 })
  end)

  it("has a pointer to its elements #cpu", function()
    local t = cf.tensor { 1, 2, 3 }
    t:data()[1] = 20
    assert.tensor(t, { 1, 20, 3 })
    assert.are.equal(0x3c00, cf.ones({ 1 }, { dtype = "f16" }):data()[0])
    assert.are.equal(0x3f80, cf.ones({ 1 }, { dtype = "bf16" }):data()[0])
  end)

  it("gives Lua values back", function()
    local t = cf.tensor({ { 1, 2 }, { 3, 0 / 0 } }, { dtype = "bf16" })
    local values = t:totable()
    assert.are.same({ 1, 2 }, values[1])
    assert.is_true(values[2][2] ~= values[2][2])
    assert.are.equal(7, cf.tensor({ { 7 } }):item())
    assert.are.same({ { 1, 3 }, { 2, 4 } }, cf.tensor({ { 1, 2 }, { 3, 4 } }):transpose(1, 2):totable())
  end)

  it("is copied and filled in place", function()
    local t = cf.zeros { 2, 2 }
    assert.are.equal(t, t:fill_(3))
    assert.tensor(t, { { 3, 3 }, { 3, 3 } })
    assert.are.equal(t, t:copy_(cf.tensor({ 1, 2 }, { dtype = "f16" })))
    assert.tensor(t, { { 1, 2 }, { 1, 2 } }, "float32")
    local u = t:clone()
    assert.are.equal(t, t:zero_())
    assert.tensor(u, { { 1, 2 }, { 1, 2 } })
    assert.tensor(t, { { 0, 0 }, { 0, 0 } })
  end)

  it("equals only itself", function()
    local t, u = cf.ones { 2 }, cf.ones { 2 }
    assert.is_true(t == t) -- luacheck: ignore 411
    assert.is_false(t == u)
    assert.is_false(t == nil)
    assert.is_false(nil == t)
    assert.is_false(t == 1)
    assert.is_false(t == "x")
    assert.is_false(t == {})
    assert.is_true(t ~= u)
    assert.is_true(cf.is_tensor(t))
    for _, value in ipairs { 1, "x", {}, ffi.new("int[1]"), print } do assert.is_false(cf.is_tensor(value)) end
    assert.is_false(cf.is_tensor(nil))
  end)

  it("can be freed early, and twice", function()
    local before = helper.live_storages()
    local t = cf.ones { 4 }
    local view = t:narrow(1, 1, 2)
    assert.are.equal(before + 1, helper.live_storages())
    t:free()
    t:free()
    assert.are.equal("[cf.Tensor freed]", tostring(t))
    assert.raises_at_caller(function() t:sum() end, "sum: argument 'self': expected a live tensor, got a tensor that was freed")
    assert.raises_at_caller(function() return t.dtype end, "freed")
    assert.raises_at_caller(function() return t[1] end, "freed")
    assert.tensor(view, { 1, 1 }) -- the view keeps the memory
    view:free()
    assert.are.equal(before, helper.live_storages())
  end)

  it("is collected when nothing refers to it", function()
    local before = helper.live_storages()
    do
      local t = cf.ones { 4 }
      t = t + 1 -- luacheck: ignore 311
    end
    assert.are.equal(before, helper.live_storages())
  end)

  it("joins with strings when printed", function()
    assert.are.equal("x = 1\n[cf.Tensor float32 1 " .. helper.device_name .. "]", ("x = " .. cf.ones { 1 }):gsub("  ", ""))
  end)
end)

describe("a tensor over foreign memory #cpu", function()
  it("shares it", function()
    local memory = ffi.new("float[6]", 1, 2, 3, 4, 5, 6)
    local t = cf.from_pointer(memory, { 2, 3 })
    assert.tensor(t, { { 1, 2, 3 }, { 4, 5, 6 } }, "float32")
    t[{ 2, 1 }] = 40
    assert.are.equal(40, memory[3])
    assert.tensor(cf.from_pointer(memory, { 3, 2 }, { strides = { 1, 3 } }), { { 1, 40 }, { 2, 5 }, { 3, 6 } })
    assert.tensor(cf.from_pointer(ffi.new("double[2]", 1, 2), { 2 }), { 1, 2 }, "float64")
    local bits = ffi.new("uint16_t[1]", 0x3c00)
    assert.tensor(cf.from_pointer(bits, { 1 }, { dtype = "f16" }), { 1 }, "float16")
    assert.tensor(cf.from_pointer(ffi.cast("void *", memory), { 1 }, { dtype = "f32" }), { 1 })
  end)

  it("keeps an FFI array alive, through views too", function()
    local view = cf.from_pointer(ffi.new("double[1000]", 7), { 1000 }):narrow(1, 3, 2)
    collectgarbage()
    collectgarbage()
    for _ = 1, 50 do ffi.new("double[1000]", 9) end
    assert.tensor(view, { 7, 7 })
  end)

  it("owns no storage", function()
    local before = helper.live_storages()
    local t = cf.from_pointer(ffi.new("float[2]"), { 2 })
    assert.are.equal(before, helper.live_storages())
    t:free()
  end)

  it("is refused where the memory cannot be meant", function()
    local memory = ffi.new("float[6]")
    assert.raises_at_caller(function() cf.from_pointer(memory, { 7 }) end, "needs 28 bytes, the array has 24")
    assert.raises_at_caller(function() cf.from_pointer(memory, { 2, 2 }, { strides = { 5, 1 } }) end, "needs 28 bytes")
    assert.raises_at_caller(function() cf.from_pointer(memory, { 2 }, { dtype = "f64" }) end, "expected 'float32'")
    assert.raises_at_caller(function() cf.from_pointer(ffi.new("char[8]"), { 2 }) end, "argument 'dtype': needed")
    assert.raises_at_caller(function() cf.from_pointer(ffi.cast("float *", 0), { 2 }) end, "NULL")
    assert.raises_at_caller(function() cf.from_pointer(ffi.cast("float *", 2), { 2 }) end, "multiple of 4")
    assert.raises_at_caller(function() cf.from_pointer(12345, { 2 }) end, "argument 'pointer'")
    assert.raises_at_caller(function() cf.from_pointer(cf.ones { 2 }, { 2 }) end, "argument 'pointer'")
  end)
end)
