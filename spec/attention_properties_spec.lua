-- What holds for attention whatever the numbers are.

local cf = require "cuflash"
local attention = require "spec.support.attention"

local masks = { [false] = "not causal", [true] = "causal" }

-- Calls body(dtype, causal) in a test of its own for each.
local function for_all(sentence, body)
  for causal, mask in pairs(masks) do
    for _, dtype in ipairs(attention.dtypes) do
      it(("%s: %s, %s"):format(sentence, mask, dtype), function() body(dtype, causal) end)
    end
  end
end

local function copy(inputs)
  local copies = {}
  for name, tensor in pairs(inputs) do copies[name] = tensor:clone() end
  return copies
end

describe("a causal query", function()
  local cases = {
    { name = "as many keys as queries", heads = 2, seq_q = 150, seq_k = 150, dim = 40 },
    { name = "more keys", heads = 4, heads_kv = 2, seq_q = 70, seq_k = 250, dim = 64 },
    { name = "fewer keys", heads = 2, seq_q = 200, seq_k = 110, dim = 32 },
  }
  -- The log-sum-exps of queries that see the changed keys become so large (32 and more) that backward does not use them.
  local changes = { { "changed", -1.5 }, { "changed to huge numbers", -300 } }

  for _, row in ipairs(cases) do
    for _, change in ipairs(changes) do
      for _, dtype in ipairs(attention.dtypes) do
        it(("does not see keys after its own that are %s: %s, %s"):format(change[1], row.name, dtype), function()
          local case = attention.case(row, { causal = true })
          local inputs = attention.make(case, dtype)
          local before = attention.run(case, inputs)
          for _, last in ipairs { case.seq_q - 1, case.seq_q - 40, case.seq_q - 69 } do
            local seen = last + case.seq_k - case.seq_q -- by the queries up to `last`
            local other = copy(inputs)
            for _, name in ipairs { "k", "v" } do other[name]:narrow(3, seen + 1, case.seq_k - seen):mul_(change[2]) end
            local after = attention.run(case, other)
            for _, name in ipairs { "o", "lse", "dq" } do
              attention.same_bits(before[name]:narrow(3, 1, last), after[name]:narrow(3, 1, last), name)
            end
            local _, report = cf.all_close(before.o:narrow(3, last + 1, 1), after.o:narrow(3, last + 1, 1))
            attention.within(1e-3, report.max_abs, "the change in o of the next query")
          end
        end)
      end
    end
  end
end)

describe("attention", function()
  -- Batch elements and KV heads (with their query heads) of which all but one get other numbers.
  local parts = { { 1, 1 }, { 2, 2 }, { 3, 1 } }

  for _, poison in ipairs { 5, 0 / 0 } do
    for_all(("computes a batch element and KV head from their own numbers, whatever the others are (%g)"):format(poison),
      function(dtype, causal)
        local case = attention.case {
          name = "independent", batch = 3, heads = 4, heads_kv = 2, seq_q = 75, seq_k = 110, dim = 40, causal = causal,
        }
        local inputs = attention.make(case, dtype)
        local before = attention.run(case, inputs)
        for _, part in ipairs(parts) do
          local function own(tensor)
            local heads = tensor:size(2) / case.heads_kv
            return tensor:narrow(1, part[1], 1):narrow(2, (part[2] - 1) * heads + 1, heads)
          end
          local other = {}
          for name, tensor in pairs(inputs) do
            other[name] = tensor:clone():fill_(poison)
            own(other[name]):copy_(own(tensor))
          end
          local after = attention.run(case, other)
          for _, name in ipairs(attention.outputs) do attention.same_bits(own(before[name]), own(after[name]), name) end
        end
      end)
  end

  for _, dtype in ipairs(attention.dtypes) do
    it("does not care for the order of keys and values: " .. dtype, function()
      local case = attention.case { name = "order", batch = 2, heads = 2, heads_kv = 1, seq_q = 75, seq_k = 210, dim = 40 }
      local inputs = attention.make(case, dtype)
      local other = copy(inputs)
      local function place(j) return j * 89 % case.seq_k + 1 end -- 89 and 210 have no common factor
      for j = 1, case.seq_k do
        for _, name in ipairs { "k", "v" } do
          other[name]:narrow(3, place(j), 1):copy_(inputs[name]:narrow(3, j, 1))
        end
      end
      local got = attention.run(case, other)
      for _, name in ipairs { "dk", "dv" } do -- back to where the keys were
        local permuted = got[name]:clone()
        for j = 1, case.seq_k do got[name]:narrow(3, j, 1):copy_(permuted:narrow(3, place(j), 1)) end
      end
      attention.check(case, dtype, inputs, got)
    end)
  end

  for_all("scales o and dq by 2 exactly when v is", function(dtype, causal)
    local case = attention.case { name = "twice", heads = 2, seq_q = 75, seq_k = 210, dim = 64, causal = causal }
    local inputs = attention.make(case, dtype)
    -- from 1 to 2, and a large d_o: no float16 result may be so small that it loses bits
    inputs.v = cf.rand(attention.shapes(case).v, {
      low = 1, high = 2, dtype = dtype, device = attention.device, generator = attention.generator(case),
    })
    inputs.d_o = inputs.d_o * 64
    local once = attention.run(case, inputs)
    inputs.v = inputs.v * 2
    local twice = attention.run(case, inputs)
    attention.same_bits(once.o * 2, twice.o, "o")
    attention.same_bits(once.lse, twice.lse, "lse")
    attention.same_bits(once.dv, twice.dv, "dv")
    if dtype ~= "float16" then attention.same_bits(once.dq * 2, twice.dq, "dq") end
  end)

  -- float32: the bound of o; 16 bits: one step, as weights may be rounded before they meet v and not in their sum
  local step_at_one = { float32 = 2e-6, float16 = 2 ^ -10, bfloat16 = 2 ^ -7 }

  for_all("gives ones where v is ones: the weights of a query add up to one", function(dtype, causal)
    local case = attention.case { name = "ones", heads = 2, seq_q = 113, seq_k = 503, dim = 40, causal = causal }
    local inputs = attention.make(case, dtype)
    local o = cf.attention(inputs.q, inputs.k, inputs.v:fill_(1), { causal = causal })
    local _, report = cf.all_close(o, cf.ones_like(o))
    attention.within(report.max_abs, step_at_one[dtype], "o")
  end)

  for_all("with grouped heads equals attention with every KV head repeated", function(dtype, causal)
    local grouped = attention.case {
      name = "grouped", batch = 2, heads = 6, heads_kv = 2, seq_q = 75, seq_k = 110, dim = 40, causal = causal,
    }
    local inputs = attention.make(grouped, dtype)
    local repeated = copy(inputs)
    for _, name in ipairs { "k", "v" } do
      repeated[name] = inputs[name]:view({ 2, 2, 1, 110, 40 }):expand({ 2, 2, 3, 110, 40 }):reshape({ 2, 6, 110, 40 })
    end
    local got = attention.run(attention.case(grouped, { heads_kv = 6 }), repeated)
    for _, name in ipairs { "dk", "dv" } do
      got[name] = got[name]:double():view({ 2, 2, 3, 110, 40 }):sum(3)
    end
    attention.check(grouped, dtype, inputs, got)
  end)
end)

describe("backward", function()
  -- Runs forward with an lse of that dtype and backward with the lse that `given` makes of it.
  local function run(case, dtype, inputs, lse_dtype, given)
    local shapes, tensors = attention.shapes(case), {}
    for name, tensor in pairs(inputs) do tensors[name] = tensor end
    for _, name in ipairs { "o", "dq", "dk", "dv" } do
      tensors[name] = cf.full(shapes[name], 0 / 0, { dtype = dtype, device = attention.device })
    end
    if lse_dtype then tensors.lse = cf.full(shapes.lse, 0 / 0, { dtype = lse_dtype, device = attention.device }) end
    attention.call(case, "forward", tensors)
    local lse = tensors.lse
    tensors.lse = given(lse)
    attention.call(case, "backward", tensors)
    return { o = tensors.o, lse = lse, dq = tensors.dq, dk = tensors.dk, dv = tensors.dv }
  end
  local function as_it_is(lse) return lse end
  local function missing() return nil end

  local cases = {
    { name = "more keys", batch = 2, heads = 4, heads_kv = 2, seq_q = 75, seq_k = 110, dim = 40 },
    { name = "more queries", heads = 2, seq_q = 110, seq_k = 75, dim = 64 },
  }
  for _, row in ipairs(cases) do
    for_all("needs no log-sum-exp: " .. row.name, function(dtype, causal)
      local case = attention.case(row, { causal = causal })
      local inputs = attention.make(case, dtype)
      local without = run(case, dtype, inputs, "float32", missing)
      attention.check(case, dtype, inputs, without)
      attention.all_same_bits(without, run(case, dtype, inputs, nil, missing), "when forward wrote no lse either")
    end)

    for_all("loses nothing to a log-sum-exp in float16: " .. row.name, function(dtype, causal)
      local case = attention.case(row, { causal = causal, bound = {
        float32 = attention.bound.float32, float16 = attention.bound.float16, bfloat16 = attention.bound.bfloat16,
        lse = 2 ^ -11,
      } })
      local inputs = attention.make(case, dtype)
      local half = run(case, dtype, inputs, "float16", as_it_is)
      attention.check(case, dtype, inputs, half)
      half.lse = nil
      attention.all_same_bits(run(case, dtype, inputs, "float32", missing), half, "as with none")
    end)
  end

  for_all("writes only the gradients that are wanted, and those as ever", function(dtype, causal)
    local case = attention.case(cases[1], { causal = causal })
    local inputs = attention.make(case, dtype)
    local all = attention.run(case, inputs)
    local _, ctx = cf.attention(inputs.q, inputs.k, inputs.v, { causal = causal, deterministic = true })
    for _, wanted in ipairs(attention.gradients) do
      local unwanted = { dq = false, dk = false, dv = false }
      unwanted[wanted] = nil
      local got = {}
      got.dq, got.dk, got.dv = ctx:backward(inputs.d_o, unwanted)
      for _, name in ipairs(attention.gradients) do
        if name == wanted then attention.same_bits(all[name], got[name], name)
        else assert.is_nil(got[name]) end
      end
    end
  end)
end)
