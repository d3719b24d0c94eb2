-- A memory learned by gradient descent through attention. Keys and values start as noise; queries are noisy cues of 32
-- countries. Head 1 learns to answer with the capital, head 2 with the currency, each spelled out as 64 bits.
-- One forward, one backward and a few tensor operations (Adam) make a step.
--
--     luajit examples/learn_memory.lua --noise 0.8

-- Finds support/ beside this file, and the repository's cuflash where none is installed.
local here = arg[0]:match "^(.*/)" or "./"
package.path = here .. "?.lua;" .. package.path .. ";" .. here .. "../lua/?.lua;" .. here .. "../lua/?/init.lua"

local cf = require "cuflash"
local arguments = require "support.arguments"
local clock = require "support.clock"
local terminal = require "support.terminal"

local options = arguments.parse {
  usage = "learn_memory.lua [options]",
  about = "Learns capitals and currencies by gradient descent through attention. Ctrl-C ends it early.",
  { "--steps", "N", "training steps", default = 150, least = 1, most = 1e6, whole = true },
  { "--noise", "X", "noise on the cues; the cues themselves have deviation 1", default = 0.6, least = 0, most = 10 },
  { "--rate", "X", "learning rate", default = 0.05, least = 0, most = 10 },
  { "--seed", "N", "of all random numbers", default = 1, least = 0, most = 2 ^ 53, whole = true },
}

local FACTS = { -- at most eight letters each
  { "Albania", "Tirana", "lek" }, { "Armenia", "Yerevan", "dram" }, { "Brazil", "Brasilia", "real" },
  { "Britain", "London", "pound" }, { "Canada", "Ottawa", "dollar" }, { "Chile", "Santiago", "peso" },
  { "China", "Beijing", "yuan" }, { "Cuba", "Havana", "peso" }, { "Czechia", "Prague", "koruna" },
  { "Egypt", "Cairo", "pound" }, { "Finland", "Helsinki", "euro" }, { "France", "Paris", "euro" },
  { "Georgia", "Tbilisi", "lari" }, { "Germany", "Berlin", "euro" }, { "Ghana", "Accra", "cedi" },
  { "Hungary", "Budapest", "forint" }, { "Iran", "Tehran", "rial" }, { "Iraq", "Baghdad", "dinar" },
  { "Italy", "Rome", "euro" }, { "Japan", "Tokyo", "yen" }, { "Kenya", "Nairobi", "shilling" },
  { "Morocco", "Rabat", "dirham" }, { "Nigeria", "Abuja", "naira" }, { "Norway", "Oslo", "krone" },
  { "Peru", "Lima", "sol" }, { "Poland", "Warsaw", "zloty" }, { "Portugal", "Lisbon", "euro" },
  { "Qatar", "Doha", "riyal" }, { "Thailand", "Bangkok", "baht" }, { "Turkey", "Ankara", "lira" },
  { "Ukraine", "Kyiv", "hryvnia" }, { "Vietnam", "Hanoi", "dong" },
}
local HEADS, LETTERS = 2, 8
local BITS = 8 * LETTERS
local CUE_DIM = 64
local SLOTS = 2 * #FACTS -- places to remember something in
local COPIES = 4         -- noisy versions of each cue in a step

-- A word as bits: 1 and -1, padded with spaces.
local function spell(word)
  local bits = {}
  for letter = 1, LETTERS do
    local byte = word:byte(letter) or 32
    for b = 7, 0, -1 do bits[#bits + 1] = math.floor(byte / 2 ^ b) % 2 == 1 and 1 or -1 end
  end
  return bits
end

local function read(bits)
  local letters = {}
  for letter = 1, LETTERS do
    local byte = 0
    for b = 1, 8 do byte = 2 * byte + (bits[8 * letter - 8 + b] > 0 and 1 or 0) end
    letters[letter] = byte >= 32 and byte < 127 and string.char(byte) or "."
  end
  return (table.concat(letters):gsub(" +$", ""))
end

-- [1, heads, facts, bits]: what each head should answer to each cue.
local function spell_answers()
  local heads = {}
  for head = 1, HEADS do
    heads[head] = {}
    for i, fact in ipairs(FACTS) do heads[head][i] = spell(fact[head + 1]) end
  end
  return cf.tensor({ heads }, { device = options.device })
end

local on_device = { device = options.device }
cf.manual_seed(options.seed)
local cues = cf.randn({ 1, 1, #FACTS, CUE_DIM }, on_device)
local answers = spell_answers()

-- The cues with fresh noise, `copies` times over: [copies, heads, facts, dim]. Both heads hear the same.
local function ask(copies)
  local noisy = cues + cf.randn({ copies, 1, #FACTS, CUE_DIM }, on_device) * options.noise
  return noisy:expand { copies, HEADS, #FACTS, CUE_DIM }
end

-- The memory: [1, heads, slots, dim], one for all copies.
local memory = {
  k = cf.randn({ 1, HEADS, SLOTS, CUE_DIM }, on_device) * 0.5,
  v = cf.randn({ 1, HEADS, SLOTS, BITS }, on_device) * 0.1,
}

local function recall(q)
  local copies = q:size(1)
  return cf.attention(q, memory.k:expand { copies, HEADS, SLOTS, CUE_DIM }, memory.v:expand { copies, HEADS, SLOTS, BITS })
end

-- Adam (Kingma and Ba 2015): the step of each number is scaled by its own gradient's first two moments.
local function adam(parameter, rate)
  local beta1, beta2, epsilon = 0.9, 0.99, 1e-8
  local mean, square, t = cf.zeros_like(parameter), cf.zeros_like(parameter), 0
  return function(gradient)
    t = t + 1
    mean:mul_(beta1):add_(gradient * (1 - beta1))
    square:mul_(beta2):add_(gradient * gradient * (1 - beta2))
    local root = (square / (1 - beta2 ^ t)):sqrt_():add_(epsilon)
    parameter:sub_(mean / root * (rate / (1 - beta1 ^ t)))
  end
end

local update_k, update_v = adam(memory.k, options.rate), adam(memory.v, options.rate)

-- One step down the gradient of the mean squared error, which it returns.
local function step()
  local o, ctx = recall(ask(COPIES))
  local difference = o - answers
  local _, dk, dv = ctx:backward(difference * (2 / o:numel()), { dq = false })
  update_k(dk:sum(1, { keepdim = true }))
  update_v(dv:sum(1, { keepdim = true }))
  ctx:free()
  return (difference * difference):mean()
end

-- How many words come back whole from cues with noise it has not heard yet, and what the first copy of each was read as.
local function examine(copies)
  local o = recall(ask(copies)):totable()
  local right, words = 0, {}
  for i, fact in ipairs(FACTS) do
    words[i] = {}
    for head = 1, HEADS do
      for copy = 1, copies do
        local word = read(o[copy][head][i])
        if word == fact[head + 1] then right = right + 1 end
        words[i][head] = words[i][head] or word
      end
    end
  end
  return right / (copies * HEADS * #FACTS), words
end

local SHOWN = 12 -- France

local done = 0
local function train()
  local every = math.max(1, math.floor(options.steps / 10))
  for i = 1, options.steps do
    local loss = step()
    done = i
    local milestone = i == 1 or i % every == 0 or i == options.steps
    if milestone or terminal.is_interactive then
      local accuracy, words = examine(1)
      terminal.progress(("step %4d   loss %.4f   words right %5.1f %%   %s: %-8s  %-8s"):format(i, loss, 100 * accuracy,
        FACTS[SHOWN][1], words[SHOWN][1], words[SHOWN][2]), milestone)
    end
  end
end

print(("%d facts, %d heads, %d slots; cues of %d numbers with noise %.2g; answers of %d bits\n"):format(#FACTS, HEADS, SLOTS,
  CUE_DIM, options.noise, BITS))

local start = clock()
local ok = terminal.run(train)
if not ok then
  print(("interrupted after %d of %d steps; this is what it knows so far"):format(done, options.steps))
end
local seconds = clock() - start

print(("\n%d steps in %.2f s, %.1f ms each\n"):format(done, seconds, 1e3 * seconds / math.max(done, 1)))
local TRIALS = 20
local accuracy, words = examine(TRIALS)
print(("%-10s %-10s %-10s"):format("cue", "capital", "currency"))
for _, i in ipairs { 3, 10, 12, 20, 26, 32 } do
  print(("%-10s %-10s %-10s"):format(FACTS[i][1], words[i][1], words[i][2]))
end
print(("\nwords recalled without a mistake: %.1f %% of %d"):format(100 * accuracy, TRIALS * HEADS * #FACTS))

local GOOD = 0.95
if ok and accuracy < GOOD then
  arguments.fail(("it has not learned its facts: fewer than %d %% of the words came back"):format(100 * GOOD))
end
