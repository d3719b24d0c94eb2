-- Attention on values that are hard: equal ones, huge logits, NaN and infinities, denormals, odd scales, rows that see
-- nothing.

local cf = require "cuflash"
local attention = require "spec.support.attention"

local float32 = { "float32" }
local masks = { [false] = "not causal", [true] = "causal" }

-- One test for every case, mask and dtype (those of the case, or all).
local function agrees(cases)
  for _, row in ipairs(cases) do
    for causal, mask in pairs(masks) do
      for _, dtype in ipairs(row.dtypes or attention.dtypes) do
        it(("%s, %s, %s"):format(row.name, mask, dtype), function()
          attention.verify(attention.case(row, { causal = causal }), dtype)
        end)
      end
    end
  end
end

-- Inputs from a function of tensor, head, row and element, all from 1.
local function fill_by(value)
  return function(case)
    local shapes, inputs = attention.shapes(case), {}
    for _, name in ipairs(attention.inputs) do
      local shape = shapes[name]
      inputs[name] = cf.empty(shape)
      local data, at = inputs[name]:data(), 0
      for head = 1, shape[1] * shape[2] do
        for row = 1, shape[3] do
          for d = 1, shape[4] do
            data[at] = value(name, head, row, d)
            at = at + 1
          end
        end
      end
    end
    return inputs
  end
end

-- ---- Equal values ------------------------------------------------------------------------------------------

local function all(value)
  return fill_by(function() return value end)
end

describe("attention on inputs that are all equal", function()
  local bound = attention.cancelling_bound
  agrees {
    { name = "0", seq_q = 70, seq_k = 100, dim = 40, fill = all(0), bound = bound },
    { name = "1", seq_q = 70, seq_k = 100, dim = 40, fill = all(1), bound = bound },
    { name = "-2.5", seq_q = 100, seq_k = 70, dim = 64, fill = all(-2.5), bound = bound },
    { name = "100", seq_q = 3, seq_k = 500, dim = 32, fill = all(100), bound = bound, dtypes = float32 },
  }
end)

-- ---- Huge logits -------------------------------------------------------------------------------------------

-- Every key is a corner of a cube; query i points at one it sees, whose logit is 256 while others stay below 150.
local pointing = { name = "pointing", batch = 2, heads = 4, heads_kv = 2, seq_q = 70, seq_k = 130, dim = 64 }

local function key_of(case, row)
  local seen = case.causal and row + case.seq_k - case.seq_q or case.seq_k
  return row * 37 % seen + 1
end

function pointing.fill(case)
  local inputs = attention.normal(case)
  local group = case.heads / case.heads_kv
  local q, k = inputs.q:data(), inputs.k:data()
  for i = 0, inputs.k:numel() - 1 do k[i] = k[i] < 0 and -8 or 8 end
  for head = 0, case.batch * case.heads - 1 do
    local kv = math.floor(head / group)
    for row = 0, case.seq_q - 1 do
      local from = (kv * case.seq_k + key_of(case, row + 1) - 1) * case.dim
      for d = 0, case.dim - 1 do q[(head * case.seq_q + row) * case.dim + d] = k[from + d] / 2 end
    end
  end
  return inputs
end

describe("attention where one logit of a row is far above all others", function()
  for causal, mask in pairs(masks) do
    for _, dtype in ipairs(attention.dtypes) do
      it(("returns that row of v exactly, %s, %s"):format(mask, dtype), function()
        local case = attention.case(pointing, { causal = causal, bound = attention.cancelling_bound })
        local got, inputs = attention.verify(case, dtype)
        for b = 1, case.batch do
          for h = 1, case.heads do
            local kv = math.ceil(h / (case.heads / case.heads_kv))
            for i = 1, case.seq_q do
              attention.same_bits(inputs.v[{ b, kv, key_of(case, i) }], got.o[{ b, h, i }], "a row of o")
            end
          end
        end
      end)
    end
  end
end)

local function on_grid(x) return math.floor(x * 4 + 0.5) / 4 end

-- Logits near `logit`, or near it and its negative: the first element of q is a, or -a, that of k is b, or -b, and
-- a * b / sqrt(64) = logit. Every product and sum is a multiple of 1/16 that float32 holds, so the logits are exact
-- and what is left to get wrong is what attention does with them. The upper half of k is large and q is 0 there:
-- the gradient of q then does not drown in the first element of k, whose contributions cancel.
local function far(a, b, signs)
  return function(case)
    local inputs = attention.normal(case)
    local random = cf.rand({ case.seq_q + case.seq_k }, { generator = attention.generator(case) })
    for name, first in pairs { q = a, k = b } do
      local data, rows = inputs[name]:data(), inputs[name]:size(3)
      for row = 0, inputs[name]:numel() / 64 - 1 do
        local place = name == "q" and 1 + row % rows or case.seq_q + 1 + row % rows
        for d = 0, 63 do
          local at = row * 64 + d
          if d == 0 then data[at] = signs and random[place] < 0.5 and -first or first
          elseif d < 32 then data[at] = on_grid(data[at])
          elseif name == "q" then data[at] = 0
          else data[at] = on_grid(data[at] * math.abs(b) / 4)
          end
        end
      end
    end
    return inputs
  end
end

describe("attention on large logits", function()
  local function case(name, a, b, signs, dtypes)
    return { name = name, heads = 2, heads_kv = 1, seq_q = 75, seq_k = 110, dim = 64, fill = far(a, b, signs), dtypes = dtypes }
  end
  agrees {
    case("near 20, whose log-sum-exp backward can use", 8, 20),
    case("near -31", 8, -31),
    case("near 33", 8, 33),
    case("near -33", 8, -33),
    case("near 100", 32, 25),
    case("near -100: every exp(logit) is 0 in float32", 32, -25),
    case("near -300", 32, -75),
    case("near -300 and 300 in one row", 32, 75, true),
    case("near 80000", 1024, 625, false, float32),
    case("near -80000", 1024, -625, false, float32),
    case("near -80000 and 80000 in one row", 1024, 625, true, float32),
  }
end)

-- Logits that go up by a step every hundred keys toward the first one: kernels walk keys from the last to the first, and what
-- they took for the largest logit is left far behind. They do so in every other query only.
local function rising(step)
  return function(case)
    local inputs = attention.normal(case)
    for name, tensor in pairs(inputs) do
      local data, rows = tensor:data(), tensor:size(3)
      for row = 0, (name == "q" or name == "k") and tensor:numel() / 64 - 1 or -1 do
        for d = 0, 63 do data[row * 64 + d] = on_grid(data[row * 64 + d]) end
        data[row * 64] = name == "q" and (row % rows % 2) * 8 or step * math.floor((rows - 1 - row % rows) / 100)
      end
    end
    return inputs
  end
end

describe("attention on logits that rise toward the first key", function()
  local function case(step)
    return {
      name = ("by steps of %d"):format(step), heads = 2, heads_kv = 1, seq_q = 75, seq_k = 590, dim = 64, fill = rising(step),
      bound = attention.cancelling_bound,
    }
  end
  agrees { case(6), case(12), case(100), case(-12) }

  it("leaves the other queries' bits alone", function()
    for _, dtype in ipairs { "float16", "bfloat16" } do
      local steep = attention.case(case(12))
      local inputs = attention.make(steep, dtype)
      local flat = attention.make(steep, dtype)
      flat.q:narrow(4, 1, 1):fill_(0)
      local one, other = attention.run(steep, inputs), attention.run(steep, flat)
      for row = 1, 75, 2 do
        for _, name in ipairs { "o", "lse" } do
          attention.same_bits(one[name]:narrow(3, row, 1), other[name]:narrow(3, row, 1), ("%s of query %d, %s"):format(name, row, dtype))
        end
      end
    end
  end)
end)

-- ---- NaN and infinities ------------------------------------------------------------------------------------

local function doubles(outputs)
  local copies = {}
  for name, tensor in pairs(outputs) do copies[name] = tensor:cpu():double():contiguous() end
  return copies
end

-- Every element of `dirty` must be what the oracle says it is: NaN or infinite where that is; the very same number as
-- without the poison where the oracle does not see it; close to the oracle elsewhere (a logit of -inf hides its key). A GPU
-- computes rows beside a NaN that they must not see again, in another order: there the same number is close enough.
local function check_spread(clean, dirty, oracle_clean, oracle_dirty, tolerance)
  for _, name in ipairs(attention.outputs) do
    local without, with = clean[name]:data(), dirty[name]:data()
    local truth_without, truth_with = oracle_clean[name]:data(), oracle_dirty[name]:data()
    for i = 0, clean[name]:numel() - 1 do
      local got, expected = with[i], truth_with[i]
      local fine
      if expected ~= expected then fine = got ~= got
      elseif expected == truth_without[i] and got == without[i] then fine = true
      elseif expected == truth_without[i] and attention.device == "cpu" then fine = false
      elseif math.abs(expected) == math.huge then fine = got == expected
      else fine = math.abs(got - expected) <= tolerance * math.max(1, math.abs(expected))
      end
      if not fine then
        error(("%s, element %d: expected %g (%g without the poison, by the oracle), got %g (%g without)"):format(name, i,
          expected, truth_without[i], got, without[i]), 2)
      end
    end
  end
end

describe("a poisoned element", function()
  local shapes = {
    { name = "all rows see something", batch = 2, heads = 4, heads_kv = 2, seq_q = 75, seq_k = 110, dim = 33, dim_v = 17 },
    { name = "some rows see nothing", batch = 1, heads = 2, heads_kv = 1, seq_q = 110, seq_k = 75, dim = 17, dim_v = 33 },
  }
  if attention.device == "cpu" then -- which has kernels of its own for few rows
    shapes[#shapes + 1] = { name = "three rows", batch = 2, heads = 2, seq_q = 3, seq_k = 209, dim = 64, dim_v = 104 }
    shapes[#shapes + 1] = { name = "nine rows", batch = 1, heads = 6, heads_kv = 2, seq_q = 3, seq_k = 110, dim = 33, dim_v = 64 }
    shapes[#shapes + 1] = { name = "sixteen rows", batch = 1, heads = 4, heads_kv = 1, seq_q = 4, seq_k = 140, dim = 96, dim_v = 40 }
  else -- whose kernels for rows of whole 16 bytes are others
    shapes[#shapes + 1] = { name = "whole vectors", batch = 2, heads = 4, heads_kv = 2, seq_q = 75, seq_k = 140, dim = 40, dim_v = 24 }
    shapes[#shapes + 1] = { name = "wide heads", batch = 1, heads = 2, heads_kv = 1, seq_q = 140, seq_k = 75, dim = 192, dim_v = 136 }
    shapes[#shapes + 1] = { name = "heads of a group in a tile", batch = 5, heads = 32, heads_kv = 2, seq_q = 3, seq_k = 40, dim = 96,
      dim_v = 24 }
    shapes[#shapes + 1] = { name = "many keys", batch = 1, heads = 2, heads_kv = 1, seq_q = 75, seq_k = 530, dim = 64, dim_v = 24 }
  end
  local poisons = { { "NaN", 0 / 0 }, { "infinity", math.huge }, { "minus infinity", -math.huge } }
  local tolerance = { float32 = 2e-5, float16 = 1e-2, bfloat16 = 8e-2 }

  for _, shape in ipairs(shapes) do
    for causal, mask in pairs(masks) do
      for _, dtype in ipairs(attention.dtypes) do
        local case = attention.case(shape, { causal = causal })
        local inputs, clean, oracle_clean

        for _, poison in ipairs(poisons) do
          for _, name in ipairs(attention.inputs) do
            -- not in row 1: what a query has no other key than that one, the oracle counts as seeing nothing
            it(("(%s in %s) stays in the rows it touches: %s, %s, %s"):format(poison[1], name, shape.name, mask, dtype), function()
              if not clean then
                inputs = attention.make(case, dtype)
                clean, oracle_clean = doubles(attention.run(case, inputs)), doubles(attention.oracle(case, inputs))
              end
              local rows = inputs[name]:size(3)
              for _, row in ipairs { 2, math.floor(rows * 0.4), math.floor(rows * 0.7), rows } do
                local dirty = {}
                for key, tensor in pairs(inputs) do dirty[key] = tensor end
                dirty[name] = inputs[name]:clone()
                dirty[name][{ case.batch, 1, row, 5 }] = poison[2]
                check_spread(clean, doubles(attention.run(case, dirty)), oracle_clean, doubles(attention.oracle(case, dirty)),
                  tolerance[dtype])
              end
            end)
          end
        end
      end
    end
  end
end)

-- ---- Denormals ---------------------------------------------------------------------------------------------

describe("attention on denormal numbers", function()
  -- step: the smallest number; size: of the inputs, below the normal range; off: by how many steps a sum may be off that
  -- is rounded once (16 bits: it is kept in float32; once more for the rounding of o), or with each of 100 terms (float32)
  local denormal = {
    float32 = { step = 2 ^ -149, size = 2 ^ -130, off = 50 },
    float16 = { step = 2 ^ -24, size = 2 ^ -16, off = 1.5 },
    bfloat16 = { step = 2 ^ -133, size = 2 ^ -128, off = 1.5 },
  }

  -- The inputs of a case, some of them of denormal size.
  local function make(case, dtype, names)
    local inputs, normal = attention.make(case, dtype), attention.normal(case)
    for _, name in ipairs(names) do
      inputs[name] = attention.to_device(normal[name]:double() * denormal[dtype].size, dtype)
    end
    return inputs
  end

  local function check(actual, expected, dtype, what)
    local _, report = cf.all_close(actual, expected)
    local bound = denormal[dtype].off * denormal[dtype].step
    attention.within(report.max_abs, bound, what)
    attention.within(3 * bound, expected:abs():max(), "three times the bound, and the largest element of " .. what)
  end

  for _, dtype in ipairs(attention.dtypes) do
    it("keeps those of v in o: " .. dtype, function()
      local case = attention.case { name = "denormal v", seq_q = 70, seq_k = 100, dim = 32 }
      local inputs = make(case, dtype, { "v" })
      check(attention.run(case, inputs).o, attention.oracle(case, inputs).o, dtype, "o")
    end)

    -- float16 has no numbers that are large enough
    if dtype ~= "float16" and attention.device == "cpu" then
      for small, huge in pairs { q = "k", k = "q", v = "d_o", d_o = "v" } do
        for _, seq_q in ipairs { 5, 70 } do -- few rows, and many
          it(("keeps those of %s in a product with huge numbers of %s: %d queries, %s"):format(small, huge, seq_q, dtype), function()
            local case = attention.case { name = "denormal " .. small, heads = 2, seq_q = seq_q, seq_k = 300, dim = 40, scale = 4 }
            local inputs, normal = attention.make(case, dtype), attention.normal(case)
            inputs[small] = attention.to_device(normal[small]:double() * 2 ^ -128, dtype)
            inputs[huge] = attention.to_device(normal[huge]:double() * 2 ^ 124, dtype)
            local got, expected = attention.run(case, inputs), attention.oracle(case, inputs)
            for _, name in ipairs((small == "q" or small == "k") and { "o", "dv" } or { "dq", "dk" }) do
              local _, report = cf.all_close(got[name], expected[name])
              attention.within(report.max_abs, (dtype == "float32" and 2e-5 or 4e-2) * expected[name]:abs():max(), name)
            end
          end)
        end
      end
    end

    it("keeps those of d_o in dv: " .. dtype, function()
      local case = attention.case { name = "denormal d_o", seq_q = 100, seq_k = 7, dim = 32 }
      local inputs = make(case, dtype, { "d_o" })
      check(attention.run(case, inputs).dv, attention.oracle(case, inputs).dv, dtype, "dv")
    end)

    it("keeps those of q and k in dq and dk: " .. dtype, function()
      local case = attention.case { name = "denormal q and k", seq_q = 40, seq_k = 10, dim = 32, scale = 1 }
      local inputs = make(case, dtype, { "q", "k" })
      local got, expected = attention.run(case, inputs), attention.oracle(case, inputs)
      attention.check(case, dtype, inputs, { o = got.o, lse = got.lse, dv = got.dv }, expected)
      check(got.dq, expected.dq, dtype, "dq")
      check(got.dk, expected.dk, dtype, "dk")
    end)
  end
end)

-- ---- Scales ------------------------------------------------------------------------------------------------

-- Small whole numbers: the scores are exact, so that a large scale does not magnify their rounding.
local function whole(case)
  local inputs = attention.normal(case)
  for _, name in ipairs { "q", "k" } do
    local data = inputs[name]:data()
    for i = 0, inputs[name]:numel() - 1 do data[i] = math.floor(data[i] * 4 + 0.5) end
  end
  return inputs
end

describe("attention with a scale", function()
  local function case(name, scale, fields)
    local row = { name = name, scale = scale, heads = 2, heads_kv = 1, seq_q = 75, seq_k = 110, dim = 40 }
    for key, value in pairs(fields or {}) do row[key] = value end
    return row
  end
  local cancelling = attention.cancelling_bound
  agrees {
    case("of 0", 0),
    case("of 1", 1, { dim = 8 }),
    case("of -1 / 8", -1 / 8),
    case("of -1 on whole numbers", -1, { fill = whole, bound = cancelling, dtypes = float32 }),
    case("of 1e-4", 1e-4),
    case("of 1e-30", 1e-30, { dtypes = float32 }),
    case("of -1e-30", -1e-30, { dtypes = float32 }),
    case("of 3 on whole numbers", 3, { fill = whole, bound = cancelling, dtypes = float32 }),
    case("of 1e4 on whole numbers", 1e4, { fill = whole, bound = cancelling, dtypes = float32 }),
    case("of 1e30 on whole numbers", 1e30, { fill = whole, bound = cancelling, dtypes = float32 }),
    case("of -1e30 on whole numbers", -1e30, { fill = whole, bound = cancelling, dtypes = float32 }),
  }

  it("of 0 has no gradient of q and k", function()
    local row = attention.case(case("of 0", 0))
    local got = attention.run(row, attention.make(row, "float32"))
    for _, name in ipairs { "dq", "dk" } do
      attention.within(got[name]:abs():max(), 0, name)
    end
  end)

  for _, scale in ipairs { 3e38, -3e38 } do
    it(("of %g, near the largest number, picks the largest score"):format(scale), function()
      local row = attention.case(case("largest", scale, { fill = whole }))
      local inputs = attention.make(row, "float32")
      local o = cf.attention(inputs.q, inputs.k, inputs.v, { scale = scale })
      local expected = cf.reference.attention(inputs.q, inputs.k, inputs.v, { scale = scale })
      attention.check(row, "float32", inputs, { o = o }, { o = expected })
    end)
  end
end)

-- ---- Rows that see nothing ---------------------------------------------------------------------------------

describe("a causal query that sees no key", function()
  local cases = {
    { name = "one more query than keys", seq_q = 66, seq_k = 65, dim = 40 },
    { name = "many more", batch = 2, heads = 4, heads_kv = 2, seq_q = 300, seq_k = 20, dim = 32, dim_v = 48 },
    { name = "one key", seq_q = 200, seq_k = 1, dim = 64 },
  }
  for _, row in ipairs(cases) do
    for _, dtype in ipairs(attention.dtypes) do
      it(("has o = 0, lse = -inf and no gradient: %s, %s"):format(row.name, dtype), function()
        local case = attention.case(row, { causal = true })
        local got = attention.verify(case, dtype)
        local blind = case.seq_q - case.seq_k
        for _, name in ipairs { "o", "dq" } do
          attention.within(got[name]:narrow(3, 1, blind):abs():max(), 0, name)
        end
        attention.within(got.lse:narrow(3, 1, blind):max(), -math.huge, "lse")
        attention.within(-1e4, got.lse:narrow(3, blind + 1, case.seq_k):min(), "lse of a row that sees something")
      end)
    end
  end
end)
