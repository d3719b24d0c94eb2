-- Attention of every shape against the float64 oracle: the output, the log-sum-exp and all three gradients.

local cf = require "cuflash"
local attention = require "spec.support.attention"

-- seq_q and seq_k around the edges of tiles, one row or key, more rows than keys (some see nothing when causal)
local sequences = {
  { seq_q = 1, seq_k = 1, dim = 32 },
  { seq_q = 1, seq_k = 1, dim = 64, dim_v = 40, batch = 3, heads = 7 },
  { seq_q = 1, seq_k = 1000, dim = 64 },
  { seq_q = 1, seq_k = 1000, dim = 40, heads = 8, heads_kv = 1 },
  { seq_q = 1, seq_k = 4100, dim = 40, heads = 4, heads_kv = 1 }, -- keys in parts, on the CPU
  { seq_q = 67, seq_k = 2050, dim = 32, heads = 2 },
  { seq_q = 3, seq_k = 500, dim = 59, dim_v = 111 },
  { seq_q = 1, seq_k = 700, dim = 111, dim_v = 59, heads = 6, heads_kv = 3 },
  { seq_q = 5, seq_k = 1, dim = 32, heads = 2 },
  { seq_q = 2, seq_k = 2, dim = 64, batch = 3, heads = 7 },
  { seq_q = 7, seq_k = 1000, dim = 32, heads = 2, heads_kv = 1 },
  { seq_q = 63, seq_k = 95, dim = 32 },
  { seq_q = 64, seq_k = 96, dim = 32 },
  { seq_q = 65, seq_k = 97, dim = 32 },
  { seq_q = 127, seq_k = 129, dim = 64 },
  { seq_q = 128, seq_k = 128, dim = 64 },
  { seq_q = 129, seq_k = 127, dim = 64 },
  { seq_q = 113, seq_k = 203, dim = 64, batch = 2, heads = 3 },
  { seq_q = 128, seq_k = 217, dim = 128 },
  { seq_q = 192, seq_k = 193, dim = 40 },
  { seq_q = 799, seq_k = 3, dim = 128, heads = 2 },
  { seq_q = 300, seq_k = 1, dim = 32 },
  { seq_q = 257, seq_k = 100, dim = 40, heads = 2 },
  { seq_q = 1023, seq_k = 1024, dim = 32 },
  { seq_q = 1024, seq_k = 1023, dim = 40 },
  { seq_q = 1300, seq_k = 1100, dim = 48, heads = 2, heads_kv = 1 }, -- backwards have keys in parts, on the CPU
}

local dims = {
  { dim = 1 }, { dim = 3 }, { dim = 32 }, { dim = 40 }, { dim = 59 }, { dim = 64 }, { dim = 96 }, { dim = 111 },
  { dim = 128 }, { dim = 160 }, { dim = 192 }, { dim = 256 }, { dim = 512 },
  { dim = 64, dim_v = 128 }, { dim = 192, dim_v = 128 }, { dim = 40, dim_v = 59 }, { dim = 128, dim_v = 1 },
  { dim = 1, dim_v = 96 }, { dim = 32, dim_v = 512 }, { dim = 512, dim_v = 3 },
}

local heads = {
  { batch = 1, heads = 1 },
  { batch = 5, heads = 1 },
  { batch = 3, heads = 2 },
  { batch = 2, heads = 2, heads_kv = 1 },
  { batch = 3, heads = 6, heads_kv = 3 },
  { batch = 1, heads = 7 },
  { batch = 3, heads = 7, heads_kv = 1 },
  { batch = 1, heads = 14, heads_kv = 2 },
  { batch = 1, heads = 8, heads_kv = 1 },
  { batch = 3, heads = 8, heads_kv = 1 },
  { batch = 1, heads = 24, heads_kv = 3 },
  { batch = 7, heads = 5 },
}

local function name_of(case)
  local name = ("batch %d, heads %d on %d, %d queries x %d keys, dim %d"):format(case.batch, case.heads, case.heads_kv,
    case.seq_q, case.seq_k, case.dim)
  return case.dim_v ~= case.dim and name .. (" (v %d)"):format(case.dim_v) or name
end

-- A head dimension that the device has no kernels for is refused, and computed by nothing else instead.
local function is_refused(case, dtype)
  local inputs = attention.make(case, dtype)
  local wide = case.dim > attention.max_dim and "q" or "v"
  assert.raises_at_caller(function() cf.attention(inputs.q, inputs.k, inputs.v, { causal = case.causal }) end,
    ("attention: argument '%s': expected a head dimension of 1 to %d"):format(wide, attention.max_dim))
end

-- One test for every row, causal or not, and dtype; `shared` are the fields all rows have.
local function agrees(rows, shared)
  for _, row in ipairs(rows) do
    for _, causal in ipairs { false, true } do
      local case = attention.case(row, shared)
      case.causal = causal
      case.name = name_of(case)
      for _, dtype in ipairs(attention.dtypes) do
        local wide = math.max(case.dim, case.dim_v) > attention.max_dim
        local name = ("%s, %s, %s"):format(case.name, causal and "causal" or "not causal", dtype)
        it(wide and "(refused) " .. name or name, function() (wide and is_refused or attention.verify)(case, dtype) end)
      end
    end
  end
end

describe("attention agrees with the oracle", function()
  describe("for any lengths:", function() agrees(sequences) end)
  describe("for any head dimension:", function() agrees(dims, { seq_q = 67, seq_k = 101 }) end)
  describe("for any batch and number of heads:", function() agrees(heads, { seq_q = 37, seq_k = 43, dim = 40 }) end)

  -- the longest only once in each dtype: the oracle takes its time
  for i, dtype in ipairs(attention.dtypes) do
    local case = attention.case { seq_q = 2048, seq_k = 2048, dim = 32, causal = i % 2 == 1 }
    case.name = name_of(case)
    it(("%s, %s, %s"):format(case.name, case.causal and "causal" or "not causal", dtype), function()
      attention.verify(case, dtype)
    end)
  end
end)
