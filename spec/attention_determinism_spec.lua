-- Attention gives the same bits every time, and for any number of threads.

local cf = require "cuflash"
local attention = require "spec.support.attention"

local cases = {
  { name = "one head, long", seq_q = 500, seq_k = 400, dim = 40 },
  { name = "many heads", batch = 3, heads = 7, seq_q = 75, seq_k = 110, dim = 32 },
  { name = "grouped heads, causal", batch = 1, heads = 8, heads_kv = 1, seq_q = 130, seq_k = 200, dim = 64, causal = true },
  { name = "one query, many keys", heads = 4, heads_kv = 1, seq_q = 1, seq_k = 15100, dim = 40 },
  { name = "grouped heads, one query each", batch = 3, heads = 10, heads_kv = 2, seq_q = 1, seq_k = 1900, dim = 64 },
  { name = "few queries, many keys, causal", batch = 2, heads = 2, seq_q = 70, seq_k = 2100, dim = 32, causal = true },
  { name = "many queries, more keys, causal", heads = 2, seq_q = 330, seq_k = 1700, dim = 32, causal = true },
  { name = "more queries than keys, causal", batch = 2, heads = 2, seq_q = 340, seq_k = 170, dim = 48, causal = true },
}

local function for_all(sentence, body)
  for _, row in ipairs(cases) do
    for _, dtype in ipairs(attention.dtypes) do
      it(("%s: %s, %s"):format(sentence, row.name, dtype), function()
        local case = attention.case(row)
        body(case, attention.make(case, dtype))
      end)
    end
  end
end

describe("attention is bit-equal", function()
  for_all("from run to run", function(case, inputs)
    local first = attention.run(case, inputs)
    for _ = 1, 4 do attention.all_same_bits(first, attention.run(case, inputs)) end
  end)
end)

describe("attention on the CPU is bit-equal #cpu", function()
  local threads = cf.num_threads()
  after_each(function() cf.num_threads(threads) end)

  for_all("for any number of threads", function(case, inputs)
    cf.num_threads(1)
    local alone = attention.run(case, inputs)
    for _, n in ipairs { 2, 3, 5 } do
      cf.num_threads(n)
      assert.are.equal(n, cf.num_threads())
      local plan = cf.explain(inputs.q, inputs.k, inputs.v, { causal = case.causal })
      assert.is_nil((plan.forward.work .. plan.backward.work):find("on 1 thread", 1, true), "there is too little work for two")
      attention.all_same_bits(alone, attention.run(case, inputs), ("with %d threads"):format(n))
    end
  end)

  for_all("whatever else is in the batch, forward", function(case, inputs)
    local all = attention.run(case, inputs)
    for b = 1, case.batch do
      local own, alone = {}, attention.case(case, { batch = 1 })
      for name, tensor in pairs(inputs) do own[name] = tensor:narrow(1, b, 1) end
      local got = attention.run(alone, own)
      for _, name in ipairs { "o", "lse" } do attention.same_bits(all[name]:narrow(1, b, 1), got[name], name) end
    end
  end)

  -- Keys that are more than an L2 cache keeps: one thread takes four row blocks of the 32 at once, 64 threads one.
  for _, dtype in ipairs { "float16", "bfloat16" } do
    it("for row blocks that go through keys together: " .. dtype, function()
      local case = attention.case {
        name = "together", heads = 8, heads_kv = 1, seq_q = 255, seq_k = 3200, dim = 128, causal = true,
      }
      local inputs, outputs = attention.make(case, dtype), {}
      for i, n in ipairs { 1, 64 } do
        cf.num_threads(n)
        local work = cf.explain(inputs.q, inputs.k, inputs.v, { causal = true, pass = "forward" }).forward.work
        local halves = n > 1 and ", the last ones by halves" or ""
        assert.is_truthy(work:find("32 row blocks each" .. halves .. ", up to 4 at a time", 1, true), work)
        local o, context = cf.attention(inputs.q, inputs.k, inputs.v, { causal = true })
        outputs[i] = { o = o, lse = context.lse }
      end
      attention.all_same_bits(outputs[1], outputs[2])
    end)
  end

  -- Threads take blocks and halves of them; tiles whose numbers are not finite are computed otherwise where they hide something.
  for _, dtype in ipairs { "float32", "float16", "bfloat16" } do
    it("for any number of threads, of numbers that are not finite: " .. dtype, function()
      local case = attention.case {
        name = "not finite", heads = 8, heads_kv = 2, seq_q = 210, seq_k = 250, dim = 40, dim_v = 72, causal = true,
      }
      for _, at in ipairs { { 1, 1, 230, 7 }, { 1, 2, 61, 39 }, { 1, 1, 100, 0 } } do
        local inputs = attention.make(case, dtype)
        if at[4] > 0 then
          inputs.k[at] = 0 / 0
          inputs.v[{ 1, 1, at[3] - 20, 70 }] = -math.huge
        end
        inputs.v[{ 1, 2, at[3], 3 }] = math.huge
        cf.num_threads(1)
        local alone = attention.run(case, inputs)
        for _, n in ipairs { 3, 7, 64 } do
          cf.num_threads(n)
          attention.all_same_bits(alone, attention.run(case, inputs), ("with %d threads"):format(n))
        end
      end
    end)
  end

  for_all("without asking for it", function(case, inputs)
    attention.all_same_bits(attention.run(case, inputs), attention.run(case, inputs, false))
  end)
end)
