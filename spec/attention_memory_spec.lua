-- Attention writes its outputs, all of them, and nothing else; it reads its inputs, and nothing else. Buffers and the gaps
-- between the rows of a view are full of NaN: what is read there shows in the results, what is written there is missed.

local ffi = require "ffi"
local cf = require "cuflash"
local attention = require "spec.support.attention"

local masks = { [false] = "not causal", [true] = "causal" }

-- A NaN that no computation returns. Copies to a device and back do not change it.
local patterns = {
  float32 = { type = "uint32_t *", value = 0x7fe5a5a5 },
  float16 = { type = "uint16_t *", value = 0x7ea5 },
  bfloat16 = { type = "uint16_t *", value = 0x7fe5 },
}

-- On the CPU.
local function guard_buffer(shape, dtype)
  local buffer = cf.empty(shape, { dtype = dtype })
  local words = ffi.cast(patterns[dtype].type, buffer:data())
  for i = 0, buffer:numel() - 1 do words[i] = patterns[dtype].value end
  return buffer
end

-- How a [batch x heads x seq x dim] (or, without dim, lse) view lies in a buffer: the order of its dimensions there.
-- Every dimension is longer in the buffer, so that there is a gap after every row and a band around it all.
local layouts = {
  { name = "batch, heads, seq, dim", order = { 1, 2, 3, 4 } },
  { name = "batch, seq, heads, dim", order = { 1, 3, 2, 4 } },
  { name = "seq, batch, heads, dim", order = { 3, 1, 2, 4 } },
}
local before = { 1, 2, 1, 3 } -- elements of NaN in front: the address is aligned to one element only
local behind = { 1, 1, 2, 4 }

local function buffer_shape(layout, shape)
  local padded = {}
  for place, dim in ipairs(layout.order) do
    if shape[dim] then padded[place] = before[dim] + shape[dim] + behind[dim] end
  end
  return padded
end

local function view_of(buffer, layout, shape)
  local view, order = buffer, { unpack(layout.order, 1, #shape) }
  for place, dim in ipairs(order) do view = view:narrow(place, before[dim] + 1, shape[dim]) end
  for dim = 1, #order do -- sort the dimensions
    for place = dim + 1, #order do
      if order[place] == dim then
        view = view:transpose(dim, place)
        order[dim], order[place] = order[place], order[dim]
      end
    end
  end
  return view
end

local Guarded = {}
Guarded.__index = Guarded

-- A view in a buffer full of NaN, itself NaN too.
local function guarded(layout, shape, dtype)
  local buffer = attention.to_device(guard_buffer(buffer_shape(layout, shape), dtype))
  return setmetatable({
    layout = layout, shape = shape, dtype = dtype, buffer = buffer, view = view_of(buffer, layout, shape),
  }, Guarded)
end

-- Asserts that all around the view is as it was.
function Guarded:assert_intact(name)
  local expected = guard_buffer(buffer_shape(self.layout, self.shape), self.dtype)
  local now = self.buffer:cpu()
  view_of(expected, self.layout, self.shape):copy_(view_of(now, self.layout, self.shape))
  assert(attention.bits(expected) == attention.bits(now), name .. ": memory outside of the view was written")
end

local cases = {
  { name = "partial tiles", batch = 2, heads = 4, heads_kv = 2, seq_q = 75, seq_k = 110, dim = 40, dim_v = 24 },
  { name = "odd head dimensions", batch = 1, heads = 3, seq_q = 33, seq_k = 97, dim = 33, dim_v = 17 },
  { name = "whole tiles", batch = 2, heads = 2, heads_kv = 1, seq_q = 64, seq_k = 192, dim = 64 },
  { name = "one query and key", batch = 3, heads = 2, seq_q = 1, seq_k = 1, dim = 5 },
  { name = "more queries than keys", batch = 1, heads = 2, seq_q = 130, seq_k = 30, dim = 32, dim_v = 1 },
}

describe("attention in guarded buffers", function()
  for _, layout in ipairs(layouts) do
    for _, row in ipairs(cases) do
      for causal, mask in pairs(masks) do
        for _, dtype in ipairs(attention.dtypes) do
          it(("writes all of its outputs and nothing else: %s; %s, %s, %s"):format(layout.name, row.name, mask, dtype), function()
            local case = attention.case(row, { causal = causal })
            local inputs, shapes = attention.make(case, dtype), attention.shapes(case)
            local expected = attention.run(case, inputs)
            local all, tensors = {}, {}
            for name, shape in pairs(shapes) do
              all[name] = guarded(layout, shape, name == "lse" and "float32" or dtype)
              tensors[name] = all[name].view
              if inputs[name] then tensors[name]:copy_(inputs[name]) end
            end

            local function call(pass, inputs_of_pass)
              local bits = {}
              for _, name in ipairs(inputs_of_pass) do bits[name] = attention.bits(all[name].buffer) end
              attention.call(case, pass, tensors)
              for _, name in ipairs(inputs_of_pass) do
                assert(bits[name] == attention.bits(all[name].buffer), ("%s: an input of %s was written"):format(name, pass))
              end
            end
            call("forward", { "q", "k", "v", "d_o", "dq", "dk", "dv" })
            call("backward", { "q", "k", "v", "o", "lse", "d_o" })
            for name, buffer in pairs(all) do buffer:assert_intact(name) end
            attention.agree(case, dtype, inputs, expected, tensors, tensors, "in guarded buffers")
          end)
        end
      end
    end
  end
end)

describe("attention on views", function()
  local case = attention.case {
    name = "views", batch = 2, heads = 4, heads_kv = 2, seq_q = 75, seq_k = 110, dim = 40, causal = true,
  }

  for _, dtype in ipairs(attention.dtypes) do
    it("of [batch x seq x heads x dim] memory gives the same bits: " .. dtype, function()
      local inputs, views = attention.make(case, dtype), {}
      for name, tensor in pairs(inputs) do views[name] = tensor:transpose(2, 3):contiguous():transpose(2, 3) end
      assert.is_false(views.q:is_contiguous())
      attention.all_same_bits(attention.run(case, inputs), attention.run(case, views))
    end)

    it("of one buffer for q, k and v, interleaved, gives the same bits: " .. dtype, function()
      local packed = attention.case { name = "packed", batch = 2, heads = 3, seq_q = 90, seq_k = 90, dim = 40, causal = true }
      local inputs, views = attention.make(packed, dtype), {}
      local options = { dtype = dtype, device = attention.device }
      local qkv = cf.full({ 2, 90, 3, 3, 40 }, 0 / 0, options)
      local gradients = cf.full({ 2, 90, 3, 3, 40 }, 0 / 0, options)
      local function part(buffer, i) return buffer:select(3, i):transpose(2, 3) end
      for i, name in ipairs { "q", "k", "v" } do views[name] = part(qkv, i):copy_(inputs[name]) end
      local bits = attention.bits(qkv)

      local o, ctx = cf.attention(views.q, views.k, views.v, { causal = true, deterministic = true })
      local dq, dk, dv = ctx:backward(inputs.d_o, { dq = part(gradients, 1), dk = part(gradients, 2), dv = part(gradients, 3) })
      attention.all_same_bits(attention.run(packed, inputs), { o = o, lse = ctx.lse, dq = dq, dk = dk, dv = dv })
      assert(bits == attention.bits(qkv), "q, k and v were written")
    end)

    it("of one buffer for the heads of q, k and v gives the same bits: " .. dtype, function()
      local self = attention.case(case, { seq_k = 75 })
      local inputs, views = attention.make(self, dtype), {}
      local buffer = cf.full({ 2, 75, 4 + 2 + 2, 40 }, 0 / 0, { dtype = dtype, device = attention.device })
      for name, heads in pairs { q = { 1, 4 }, k = { 5, 2 }, v = { 7, 2 } } do
        views[name] = buffer:narrow(3, heads[1], heads[2]):transpose(2, 3):copy_(inputs[name])
      end
      views.d_o = inputs.d_o
      attention.all_same_bits(attention.run(self, inputs), attention.run(self, views))
    end)

    it("that repeat a head or a batch element by a stride of 0 gives the same: " .. dtype, function()
      local inputs, views, copies = attention.make(case, dtype), {}, {}
      for name, tensor in pairs(inputs) do
        local dim = (name == "k" or name == "q") and 1 or 2
        views[name] = tensor:narrow(dim, 1, 1):expand(tensor:shape())
        copies[name] = views[name]:contiguous()
      end
      assert.are.equal(0, views.k:stride(1))
      attention.agree(case, dtype, copies, attention.run(case, copies), views, attention.run(case, views))
    end)
  end

  it("gives the oracle the same numbers too", function()
    local inputs, views = attention.normal(case), {}
    for name, tensor in pairs(inputs) do views[name] = tensor:transpose(2, 3):contiguous():transpose(2, 3) end
    attention.all_same_bits(attention.oracle(case, inputs), attention.oracle(case, views))
  end)
end)

describe("attention with tensors to write to", function()
  local case = attention.case { name = "given", heads = 2, heads_kv = 1, seq_q = 75, seq_k = 110, dim = 40, dim_v = 24 }
  local shapes = attention.shapes(case)

  for _, dtype in ipairs(attention.dtypes) do
    it("fills and returns them: " .. dtype, function()
      local inputs = attention.make(case, dtype)
      local expected = attention.run(case, inputs)
      local given = {}
      for _, name in ipairs { "o", "dq", "dk", "dv" } do
        given[name] = cf.full(shapes[name], 0 / 0, { dtype = dtype, device = attention.device })
      end
      local o, ctx = cf.attention(inputs.q, inputs.k, inputs.v, { out = given.o, deterministic = true })
      local dq, dk, dv = ctx:backward(inputs.d_o, { dq = given.dq, dk = given.dk, dv = given.dv })
      for name, returned in pairs { o = o, dq = dq, dk = dk, dv = dv } do
        assert(given[name]:data() == returned:data(), name .. " is not the tensor that was given")
      end
      given.lse = ctx.lse
      attention.all_same_bits(expected, given)
    end)
  end

  it("leaves nothing behind but its outputs", function()
    local inputs, tensors = attention.make(case, "float16"), {}
    for name, shape in pairs(shapes) do
      tensors[name] = inputs[name]
        or cf.empty(shape, { dtype = name == "lse" and "float32" or "float16", device = attention.device })
    end
    collectgarbage()
    collectgarbage("stop") -- of tensors that died meanwhile
    local live = cf.memory_stats(attention.device).live_bytes
    attention.call(case, "forward", tensors)
    attention.call(case, "backward", tensors)
    local now = cf.memory_stats(attention.device).live_bytes
    collectgarbage("restart")
    assert.are.equal(live, now)
  end)
end)
