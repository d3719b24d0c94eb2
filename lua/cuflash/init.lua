--- cuflash: attention you can script.
--
--     local cf = require "cuflash"
--     local q, k, v = cf.randn{1, 8, 512, 64}, cf.randn{1, 8, 512, 64}, cf.randn{1, 8, 512, 64}
--     local o, ctx = cf.attention(q, k, v, {causal = true})
--     local dq, dk, dv = ctx:backward(cf.ones_like(o))
--
-- Dimensions and indices count from 1, slices include both ends, negative ones count from the end. Misuse raises an error
-- at the caller's line; what can fail in good use (a missing file) returns nil and a message.
-- @module cuflash

local has_ffi, ffi = pcall(require, "ffi")
if not has_ffi then error("cuflash needs LuaJIT (its ffi module); this is " .. _VERSION, 0) end
local library = require "cuflash.library"
local errors = require "cuflash.errors"
local tensor = require "cuflash.tensor"
local borrow = require "cuflash.borrow"
local create = require "cuflash.create"
local cuda = require "cuflash.cuda"
local random = require "cuflash.random"
local attention = require "cuflash.attention"
local reference = require "cuflash.reference"
local compare = require "cuflash.compare"
local gradcheck = require "cuflash.gradcheck"
local handle = require "cuflash.handle"
local machine = require "cuflash.machine"
local memory = require "cuflash.memory"
local npy = require "cuflash.npy"
local safetensors = require "cuflash.safetensors"

local C = library.C

-- Ctrl-C in a long call then raises "interrupted" instead of ending the process.
C.cuflash_catch_sigint(true)

local cf = {
  version = ffi.string(C.cuflash_version()),
  library_path = library.path,

  tensor = create.tensor,
  empty = create.empty,
  zeros = create.zeros,
  ones = create.ones,
  full = create.full,
  arange = create.arange,
  empty_like = create.empty_like,
  zeros_like = create.zeros_like,
  ones_like = create.ones_like,
  from_pointer = borrow.from_pointer,
  is_tensor = handle.is_tensor,

  rand = random.rand,
  randn = random.randn,
  rand_like = random.rand_like,
  randn_like = random.randn_like,
  manual_seed = random.manual_seed,
  generator = random.generator,

  maximum = tensor.methods.maximum,
  minimum = tensor.methods.minimum,

  attention = attention.attention,
  explain = attention.explain,
  reference = { attention = reference.attention },
  gradcheck = gradcheck.gradcheck,
  all_close = compare.all_close,
  equal = compare.equal,

  save = npy.save,
  load = npy.load,
  safetensors = { save = safetensors.save, load = safetensors.load },

  cpu = machine.cpu,
  cuda = cuda,
  num_threads = machine.num_threads,
  synchronize = machine.synchronize,
  memory_stats = memory.memory_stats,
  memory_limit = memory.memory_limit,
  memory_soft_limit = memory.memory_soft_limit,
  memory_reset_peak = memory.memory_reset_peak,
  memory_trim = memory.memory_trim,
}

return setmetatable(cf, {
  __index = function(_, key)
    errors.raise("cuflash has no '%s'%s", tostring(key), errors.suggest(key, cf))
  end,
  __tostring = function() return ("cuflash %s (%s)"):format(cf.version, library.path) end,
})
