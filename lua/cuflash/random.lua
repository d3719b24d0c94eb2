--- Random numbers: the same seed gives the same values, on every device and for any number of threads.
-- @module cuflash.random

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local create = require "cuflash.create"

local random = {}

local C = native.C

local Generator = {}
Generator.__index = Generator

local function check_seed(name, seed)
  if ffi.istype("uint64_t", seed) then return seed end
  return checks.integer(name, "seed", seed, 0, 2 ^ 53)
end

local function check_generator(name, argument, value)
  if getmetatable(value) ~= Generator then checks.fail(name, argument, "a generator made by cf.generator(seed)", value) end
  return value
end

--- A random number generator of its own, for the option `generator` of rand and randn.
-- @tparam[opt=0] number seed a whole number from 0, or a uint64_t
-- @treturn Generator with the methods :seed(), :offset() (blocks of four words drawn so far), :manual_seed(seed), :clone()
-- @function generator
function random.generator(seed)
  seed = check_seed("generator", seed == nil and 0 or seed)
  return setmetatable({ state = ffi.new("cuflash_generator", seed, 0) }, Generator)
end

function Generator:seed()
  return tonumber(check_generator("seed", "self", self).state.seed)
end

function Generator:offset()
  return tonumber(check_generator("offset", "self", self).state.offset)
end

function Generator:manual_seed(seed)
  local state = check_generator("manual_seed", "self", self).state
  state.seed, state.offset = check_seed("manual_seed", seed), 0
  return self
end

function Generator:clone()
  check_generator("clone", "self", self)
  return setmetatable({ state = ffi.new("cuflash_generator", self.state) }, Generator)
end

function Generator:__tostring()
  return ("[cf.Generator seed %.0f offset %.0f]"):format(self:seed(), self:offset())
end

local default = random.generator(0)

--- Seeds the generator that rand and randn use. Without it a program starts from seed 0.
-- @tparam number seed a whole number from 0, or a uint64_t
-- @treturn Generator the default generator
-- @function manual_seed
function random.manual_seed(seed)
  return default:manual_seed(seed)
end

-- A function that makes a tensor and fills it; `first` and `second` are the names of two numeric options.
local function filler(name, maker, fill, first, first_default, second, second_default)
  local known = { dtype = true, device = true, generator = true, [first] = true, [second] = true }
  return function(target, options)
    options = checks.options(name, options, known)
    local a, b = options[first], options[second]
    a = checks.finite(name, first, a == nil and first_default or a)
    b = checks.finite(name, second, b == nil and second_default or b)
    local generator = default
    if options.generator ~= nil then generator = check_generator(name, "generator", options.generator) end
    local tensor = maker(name, target, { dtype = options.dtype, device = options.device })
    local status = native.try(fill, tensor, generator.state, a, b)
    if status ~= 0 then
      tensor:free()
      native.fail(name)
    end
    return tensor
  end
end

--- Numbers from the normal distribution.
-- @tparam {number,...} shape
-- @tparam[opt] table options mean (0), std (1), generator, dtype, device
-- @treturn Tensor
-- @function randn
random.randn = filler("randn", create.make, C.cuflash_random_normal, "mean", 0, "std", 1)

--- Numbers from the uniform distribution over low ... high, high excluded.
-- @tparam {number,...} shape
-- @tparam[opt] table options low (0), high (1), generator, dtype, device
-- @treturn Tensor
-- @function rand
random.rand = filler("rand", create.make, C.cuflash_random_uniform, "low", 0, "high", 1)

--- Numbers from the normal distribution, with the shape, dtype and device of another tensor.
-- @tparam Tensor tensor
-- @tparam[opt] table options mean (0), std (1), generator, dtype, device
-- @treturn Tensor
-- @function randn_like
random.randn_like = filler("randn_like", create.make_like, C.cuflash_random_normal, "mean", 0, "std", 1)

--- Numbers from the uniform distribution, with the shape, dtype and device of another tensor.
-- @tparam Tensor tensor
-- @tparam[opt] table options low (0), high (1), generator, dtype, device
-- @treturn Tensor
-- @function rand_like
random.rand_like = filler("rand_like", create.make_like, C.cuflash_random_uniform, "low", 0, "high", 1)

return random
