-- Next-byte prediction without training: an induction head made by hand, over a real text, in one call.
--
-- A query stands for the bytes up to some place of the text, the keys for the bytes up to every earlier place, and the
-- value of a place is the byte that followed there, one-hot. So the output is a distribution over the next byte: that of
-- what came next wherever the text looked like this before. Each context is embedded as random signs, 16 for its last
-- byte, 16 for its last two, and so on; q.k is large where they match, and softmax makes a place with a longer match count
-- many times more. The log-sum-exp tells how much evidence there was, and how far to trust it.
--
--     luajit examples/induction.lua /usr/share/common-licenses/GPL-3 --prompt "You may "

-- Finds support/ beside this file, and the repository's cuflash where none is installed.
local here = arg[0]:match "^(.*/)" or "./"
package.path = here .. "?.lua;" .. package.path .. ";" .. here .. "../lua/?.lua;" .. here .. "../lua/?/init.lua"

local ffi = require "ffi"
local bit = require "bit"
local cf = require "cuflash"
local arguments = require "support.arguments"
local clock = require "support.clock"
local texts = require "support.texts"

local options = arguments.parse {
  usage = "induction.lua [FILE] [options]",
  about = "Predicts every byte of a text from what followed similar places before, by attention alone.\n"
    .. "Without FILE it reads the longest text of this repository.",
  positional = 1,
  { "--bytes", "N", "read at most so many; time grows with the square", default = 32768, least = 1000, most = 2 ^ 20,
    whole = true },
  { "--prompt", "TEXT", "what to continue; it sees the last five bytes", default = "The " },
  { "--length", "N", "bytes to continue with", default = 200, least = 0, most = 10000, whole = true },
  { "--temperature", "X", "of the continuation; 0 takes the likeliest byte", default = 0.4, least = 0, most = 10 },
  { "--seed", "N", "of the continuation", default = 1, least = 0, most = 2 ^ 53, whole = true },
  { "--word", "WORD", "show what it looked at after three letters of this word" },
}

local SUFFIXES = { 1, 2, 3, 5 } -- how many last bytes are compared
local SIGNS = 16                -- of each suffix
local DIM = #SUFFIXES * SIGNS
local GAIN = 3.5                -- a matching suffix multiplies the weight of a place by e^3.5
local SCALE = GAIN / SIGNS
local DOUBT = 5                 -- log-weight of the unigram guess beside the evidence, which weighs e^lse
local TRUST = 0.97              -- but the evidence gets no more than this

-- ---- The text as tensors -----------------------------------------------------------------------------

-- Jenkins's one-at-a-time hash, one byte further.
local function stir(hash, byte)
  hash = bit.tobit(hash + byte)
  hash = bit.tobit(hash + bit.lshift(hash, 10))
  return bit.bxor(hash, bit.rshift(hash, 6))
end

local function finish(hash)
  hash = bit.tobit(hash + bit.lshift(hash, 3))
  hash = bit.bxor(hash, bit.rshift(hash, 11))
  return bit.tobit(hash + bit.lshift(hash, 15))
end

-- [1, 1, #text, DIM]: the context that ends at each byte.
local function embed(text)
  local e = cf.empty { 1, 1, #text, DIM }
  local data, at = e:data(), 0
  for place = 1, #text do
    local hash, length = 0, 0
    for _, suffix in ipairs(SUFFIXES) do
      while length < suffix do
        local byte = length < place and text:byte(place - length) or 0
        hash = stir(hash, byte + 1)
        length = length + 1
      end
      local signs = finish(hash)
      for s = 0, SIGNS - 1 do
        data[at] = bit.band(bit.rshift(signs, s), 1) * 2 - 1
        at = at + 1
      end
    end
  end
  return e
end

-- The distinct bytes in order, and the number (from 0) of each.
local function alphabet_of(text)
  local letters, number = {}, {}
  for byte = 0, 255 do
    if text:find(string.char(byte), 1, true) then
      number[byte] = #letters
      letters[#letters + 1] = string.char(byte)
    end
  end
  return letters, number
end

-- [1, 1, last - first + 1, letters]: the bytes from first to last, one-hot.
local function one_hot(text, first, last, letters, number)
  local v = cf.zeros { 1, 1, last - first + 1, #letters }
  local data = v:data()
  for place = first, last do data[(place - first) * #letters + number[text:byte(place)]] = 1 end
  return v
end

local root = here .. "../"
local path = options[1] or texts.longest(root)
if not path then arguments.fail "there is no text in this repository; name a FILE" end
local text, size = texts.read(path, options.bytes)
if not text then arguments.fail(size) end
local bytes_read = #text
text = text:gsub(" +", " ") -- indentation is easy to predict, and a memory of five bytes never finds its end
local SHORTEST = 1000
if #text < SHORTEST then
  arguments.fail(("%s: it is too short to find anything twice; at least %d bytes are needed"):format(path, SHORTEST))
end

-- Keys are the contexts that end at 1 ... n, values the bytes after them, queries the contexts that end at 2 ... n + 1: one
-- place on, so that under the causal mask a query sees a place only if the byte that followed it is part of the context.
local letters, number = alphabet_of(text)
local n = #text - 2
local contexts = embed(text)
local k = contexts:narrow(3, 1, n):to(options.device)
local q = contexts:narrow(3, 2, n):to(options.device)
local v = one_hot(text, 2, n + 1, letters, number):to(options.device)

local start = clock()
local o, ctx = arguments.try(cf.attention, q, k, v, { causal = true, scale = SCALE })
cf.synchronize()
local seconds = clock() - start

local shown_path = options[1] or path:sub(#root + 1)
local extent = bytes_read < size and ("the first %d of %d bytes"):format(bytes_read, size) or ("%d bytes"):format(size)
print(("text       %s, %s, runs of spaces as one"):format(shown_path, extent))
print(("attention  %d queries x %d keys, causal, head dim %d, values of %d: %.2f s, %.0f GFLOP/s\n"):format(n, n, DIM,
  #letters, seconds, n * n * (DIM + #letters) / seconds * 1e-9))

-- ---- How good the predictions are --------------------------------------------------------------------

local probabilities, lse = o:to "cpu", ctx.lse:to "cpu"

-- How far to trust evidence of this log-sum-exp.
local function trust(evidence)
  return TRUST / (1 + math.exp(DOUBT - evidence))
end

local function largest(row, count)
  local best = 0
  for i = 1, count - 1 do
    if row[i] > row[best] then best = i end
  end
  return best
end

-- The share of bytes predicted right and the bits per byte: by the counts of the bytes so far, and by attention.
local function score()
  local p, evidence, count = probabilities:data(), lse:data(), #letters
  local seen = ffi.new("double[?]", count)
  local unigram, attention = { right = 0, bits = 0 }, { right = 0, bits = 0 }
  local function guess(model, best, byte, probability)
    if best == byte then model.right = model.right + 1 / n end
    model.bits = model.bits - math.log(probability) / math.log(2) / n
  end
  seen[number[text:byte(1)]] = 1
  for place = 2, n + 1 do
    local byte, following = number[text:byte(place)], number[text:byte(place + 1)]
    seen[byte] = seen[byte] + 1
    local row, trusted = p + (place - 2) * count, trust(evidence[place - 2])
    local plain = (seen[following] + 0.5) / (place + 128) -- half a count for each of 256 bytes
    guess(unigram, largest(seen, count), following, plain)
    guess(attention, largest(row, count), following, trusted * row[following] + (1 - trusted) * plain)
  end
  return unigram, attention
end

local unigram, attention = score()
print("                             next byte right   bits per byte")
print(("the commonest byte so far    %13.1f %%   %13.2f"):format(100 * unigram.right, unigram.bits))
print(("attention, without training  %13.1f %%   %13.2f\n"):format(100 * attention.right, attention.bits))

-- ---- What it looked at -------------------------------------------------------------------------------

-- Where a word's last occurrence has come to its third letter, or nil.
local function third_letter(word)
  local last, at = nil, 0
  repeat
    at = text:find(word, at + 1, true)
    last = at or last
  until not at
  local third = last and last + math.min(3, #word - 1) - 1
  return third and third >= 2 and third <= n + 1 and third or nil
end

-- The longest word that the text has at least five times.
local function telling_word()
  local times, best = {}, nil
  for word in text:gmatch "%a%a%a%a%a%a+" do times[word] = (times[word] or 0) + 1 end
  for word, count in pairs(times) do
    if count >= 5 and third_letter(word) and (not best or #word > #best or #word == #best and word < best) then best = word end
  end
  return best
end

-- The weight of every place that the query of context `place` saw, and their sum, which is one.
local function weights_at(place)
  local query, seen = contexts:narrow(3, place, 1), contexts:narrow(3, 1, place - 1)
  local scores = (seen * query):sum(-1) * SCALE
  local weights = (scores - lse[{ 1, 1, place - 1 }]):exp()
  return weights:view({ -1 }):totable(), weights:sum()
end

local BEFORE, AFTER, SHOWN = 30, 20, 5

local function snippet(place)
  local before = texts.on_one_line(text:sub(math.max(1, place - BEFORE + 1), place))
  local after = texts.on_one_line(text:sub(place + 2, place + AFTER))
  return ("%" .. BEFORE .. "s[%s]%s"):format(before, texts.on_one_line(text:sub(place + 1, place + 1)), after)
end

local function show_attended(place)
  local weights, total = weights_at(place)
  local order = {}
  for i = 1, #weights do order[i] = i end
  table.sort(order, function(a, b) return weights[a] > weights[b] or weights[a] == weights[b] and a > b end)
  print(("predicting  place %6d            %s"):format(place + 1, snippet(place)))
  for i = 1, math.min(SHOWN, #order) do
    local seen = order[i]
    print(("%-10s  place %6d  %6.1f %%  %s"):format(i == 1 and "from" or "", seen + 1, 100 * weights[seen], snippet(seen)))
  end
  print()
  return total
end

local word = options.word or telling_word()
local place = word and third_letter(word)
if options.word and not place then arguments.fail(("--word: the text does not have '%s'"):format(options.word), 2) end
local total = place and show_attended(place) or 1

-- ---- Continuing a prompt -----------------------------------------------------------------------------

-- Draws a byte's number from a row of probabilities, sharpened by the temperature.
local function draw(row, temperature)
  local best = largest(row, #letters)
  if temperature == 0 then return best end
  local sum, share = 0, {}
  for i = 0, #letters - 1 do
    share[i] = (row[i] / row[best]) ^ (1 / temperature)
    sum = sum + share[i]
  end
  local left = math.random() * sum
  for i = 0, #letters - 1 do
    left = left - share[i]
    if left < 0 then return i end
  end
  return best
end

-- Calls write with each byte that follows the prompt.
local function continue(prompt, length, write)
  local longest = SUFFIXES[#SUFFIXES]
  local tail = prompt:sub(-longest)
  local out = cf.empty({ 1, 1, 1, #letters }, { device = options.device })
  for _ = 1, length do
    local query = embed(tail):narrow(3, #tail, 1):to(options.device)
    local _, context = cf.attention(query, k, v, { scale = SCALE, out = out })
    context:free()
    local row = out:to "cpu" -- holds the memory that data() points to
    local letter = letters[1 + draw(row:data(), options.temperature)]
    write(letter)
    tail = (tail .. letter):sub(-longest)
  end
end

if options.length > 0 then
  math.randomseed(options.seed)
  print(("it continues '%s':"):format(options.prompt))
  io.write("  ", options.prompt)
  local column, WIDTH = #options.prompt, 80
  arguments.try(continue, options.prompt, options.length, function(letter)
    if letter == " " and column > WIDTH then letter = "\n" end
    column = letter == "\n" and 0 or column + 1
    io.write((letter:gsub("\n", "\n  ")))
    io.flush()
  end)
  print()
end

-- ---- Checks ------------------------------------------------------------------------------------------

if math.abs(total - 1) > 1e-4 then arguments.fail(("the weights of a place add up to %.6f instead of 1"):format(total)) end
if not options[1] and not (attention.right > unigram.right and attention.bits < unigram.bits) then
  arguments.fail "attention predicted no better than the commonest byte"
end
