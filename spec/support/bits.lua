-- Tensors whose bits matter: where they come from, and whether they are the same.

local cf = require "cuflash"
local assert = require "luassert"
local ffi = require "ffi"

local bits = {}

local BYTES = { float32 = 4, float16 = 2, bfloat16 = 2, float64 = 8 }
local WORDS = { [2] = "uint16_t *", [4] = "uint32_t *", [8] = "uint64_t *" }

local function words(tensor)
  return ffi.cast(WORDS[BYTES[tensor.dtype]], tensor:data())
end

--- Raises unless two tensors have the same dtype, shape and bits; where any_nan, a NaN may be any other one.
function bits.assert_same(got, expected, what, any_nan)
  assert.are.equal(expected.dtype, got.dtype)
  assert.are.same({ expected:shape() }, { got:shape() })
  got, expected = got:cpu():contiguous(), expected:contiguous()
  local n = got:numel()
  local a, b = words(got), words(expected)
  if ffi.string(a, n * BYTES[got.dtype]) == ffi.string(b, n * BYTES[got.dtype]) then return end
  local values, others = got:double(), expected:double()
  local x, y = values:data(), others:data()
  for i = 0, n - 1 do
    if a[i] ~= b[i] and not (any_nan and x[i] ~= x[i] and y[i] ~= y[i]) then
      error(("%s: element %d of %d: expected %.17g (0x%s), got %.17g (0x%s)"):format(what, i, n, y[i],
        bit.tohex(b[i]), x[i], bit.tohex(a[i])), 2)
    end
  end
end

--- Views of every kind: a name, and a function from the base to a view of it.
bits.views = {
  { "the whole", function(t) return t end },
  { "one dimension, odd start and length", function(t) return t:view { 2880 }:narrow(1, 4, 2001) end },
  { "whole quads of rows", function(t) return t:view { 24, 120 }:narrow(2, 5, 64) end },
  { "parts of rows", function(t) return t:narrow(3, 2, 3) end },
  { "every sixth", function(t) return t:select(3, 5) end },
  { "turned", function(t) return t:transpose(1, 3) end },
  { "turned parts", function(t) return t:narrow(2, 3, 13):transpose(1, 2) end },
  { "one element", function(t) return t:narrow(1, 3, 1):narrow(2, 4, 1):narrow(3, 2, 1) end },
}

--- 24 x 20 x 6 elements that are 7.
function bits.base(dtype, device)
  return cf.full({ 24, 20, 6 }, 7, { dtype = dtype, device = device })
end

-- A CPU tensor of the dtype with these bits.
local function from_bits(dtype, n, bits_of)
  local t = cf.empty({ n }, { dtype = dtype })
  local data = words(t)
  for i = 0, n - 1 do data[i] = bits_of(i) end
  return t
end

--- 65536 patterns of bits of a dtype: of 16 bits all, otherwise infinities, NaNs, denormals, what lies halfway between numbers of
-- less wide dtypes or just beside, and anything.
function bits.of_all_kinds(dtype)
  if BYTES[dtype] == 2 then return from_bits(dtype, 65536, function(i) return i end) end
  local state, n = 88172645463325252ULL, 2 ^ 16
  local function random()
    state = bit.bxor(state, bit.lshift(state, 13))
    state = bit.bxor(state, bit.rshift(state, 7))
    state = bit.bxor(state, bit.lshift(state, 17))
    return state
  end
  if dtype == "float32" then
    return from_bits(dtype, n, function(i)
      local word = tonumber(random() % 2 ^ 32)
      local low = ({ 0x1000, 0x8000, 0x3000, 0x18000 })[i % 4 + 1] -- half an ulp of float16 and bfloat16
      if i % 3 == 0 then return math.floor(word / 2 ^ 17) * 2 ^ 17 + low + i % 5 - 2 end
      if i % 31 == 1 then return 0x7f800000 + i % 7 * 0x11111 + i % 2 * 2 ^ 31 end -- infinities and NaNs
      if i % 31 == 2 then return word % 2 ^ 23 + i % 2 * 2 ^ 31 end              -- denormals
      return word
    end)
  end
  return from_bits(dtype, n, function(i)
    local word = random()
    local exponent = 0ULL + (i % 2 == 0 and 1023 - 30 + i % 60 or 1023 - 155 + i % 300)
    local sign = bit.lshift(0ULL + i % 2, 63)
    if i % 5 == 0 then return word end
    if i % 31 == 1 then return bit.bor(sign, 0x7ff0000000000000ULL, i % 62 == 1 and 0ULL or bit.rshift(word, 12)) end
    if i % 31 == 2 then return bit.bor(sign, bit.rshift(word, 12)) end -- denormals
    -- 10, 7 or 23 bits of mantissa, then a half, then nothing or the last bit
    local kept = ({ 10, 7, 23 })[i % 3 + 1]
    local mantissa = bit.lshift(bit.rshift(word, 64 - kept), 52 - kept)
    return bit.bor(sign, bit.lshift(exponent, 52), mantissa, bit.lshift(1ULL, 51 - kept), 0ULL + i % 4 % 2)
  end)
end

return bits
