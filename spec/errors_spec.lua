local cf = require "cuflash"
local ffi = require "ffi"
local helper = require "spec.helper"
local methods = require("cuflash.tensor").methods
local Stream, Event = require("cuflash.stream").Stream, require("cuflash.stream").Event

-- Every public function with every argument wrong, one at a time. What must hold: a message that begins with the
-- caller's line and names the function and the argument, nothing leaked, and a good call that works afterwards.

local NIL = {}                 -- stands for nil in a list of wrong values
local NAN, INF = 0 / 0, math.huge

local freed = cf.ones { 2 }
freed:free()

-- Wrong values by the kind of argument.
local function no_tensor() return { NIL, 1, "x", true, {}, print, freed, ffi.new("int[2]") } end
local function no_dim(ndim) return { NIL, 0, ndim + 1, -ndim - 1, 1.5, NAN, INF, "1", {} } end
local function no_index(size) return { NIL, 0, size + 1, -size - 1, 1.5, NAN, -INF, "1", true } end
local function no_shape()
  return { NIL, 3, "2x3", { 0 }, { -2 }, { 1.5 }, { NAN }, { INF }, { 2, "3" }, { a = 1 }, { 1, 1, 1, 1, 1, 1, 1, 1, 1 },
    { 2 ^ 31, 2 ^ 31 }, { 2 ^ 53 }, cf.ones { 2 } }
end
local function no_number() return { NIL, "1", {}, true, print } end
local function no_finite() return { "1", {}, true, NAN, INF, -INF } end
local function no_count() return { 0, -1, 1.5, NAN, INF, "2", {}, 2 ^ 60 } end
local function no_path() return { NIL, 1, {}, "", "a\0b" } end
local function no_options() return { 1, "x", true, print, { nonsense = 1 }, { 1 } } end
local function no_dtype() return { { dtype = "int8" }, { dtype = 1 }, { dtype = "" } } end
local function no_device() return { { device = "gpu" }, { device = 0 }, { device = "cuda:x" }, { device = "cuda:-1" },
  { device = "cuda:99999999999" }, { device = "cuda:4096" } } end
local function join(...)
  local list = {}
  for _, part in ipairs { ... } do
    for _, value in ipairs(part) do list[#list + 1] = value end
  end
  return list
end
local function creation() return join(no_options(), no_dtype(), no_device()) end
local function no_operand() return { NIL, "x", {}, true, freed } end

local t = cf.arange(6):view { 2, 3 }
local four = cf.randn { 1, 2, 3, 4 }
local file = os.tmpname()
local function sum(x) return x:sum() end

-- Where there is no CUDA these have no handle; arguments are looked at before it.
local has_cuda, why_no_cuda = cf.cuda.is_available()
local stream = has_cuda and cf.cuda.stream() or setmetatable({}, Stream)
local event = has_cuda and cf.cuda.event():record() or setmetatable({ recorded = true }, Event)
local function no_stream() return { NIL, 1, "x", {}, print, t, event } end
local function no_event() return { NIL, 1, "x", {}, print, t, stream } end
local function no_cuda_device() return { 0, "cpu", "gpu", "", true, {}, "cuda:x", "cuda:-1", "cuda:4096", "cuda:99999999999" } end

-- name -> { function, good arguments, wrong values of each argument }. A method's first argument is the tensor. The good call of those
-- marked cuda needs a CUDA device.
local cases = {
  tensor = { cf.tensor, { { 1, 2 } }, { { NIL, "x", true, t, {}, { 1, "a" }, { 1, {} }, { { 1 }, 2 }, { { 1 }, { 1, 2 } },
    { 1, nil, 3 }, { x = 1 }, { {} }, { 1, x = 2 } }, creation() } },
  empty = { cf.empty, { { 2 } }, { no_shape(), creation() } },
  zeros = { cf.zeros, { { 2 } }, { no_shape(), creation() } },
  ones = { cf.ones, { { 2 } }, { no_shape(), creation() } },
  full = { cf.full, { { 2 }, 1 }, { no_shape(), no_number(), creation() } },
  arange = { cf.arange, { 1, 3, 1 }, { join({ NIL }, no_finite()), { "1", NAN, INF, 0, true }, { "1", NAN, INF, 0, -1, true, 1e-300 },
    creation() } },
  empty_like = { cf.empty_like, { t }, { no_tensor(), creation() } },
  zeros_like = { cf.zeros_like, { t }, { no_tensor(), creation() } },
  ones_like = { cf.ones_like, { t }, { no_tensor(), creation() } },
  rand = { cf.rand, { { 2 } }, { no_shape(), join(creation(), { { low = "0" }, { high = NAN }, { low = 2, high = 1 }, { generator = 1 } }) } },
  randn = { cf.randn, { { 2 } }, { no_shape(), join(creation(), { { mean = INF }, { std = -1 }, { std = "1" }, { generator = {} } }) } },
  rand_like = { cf.rand_like, { t }, { no_tensor(), join(creation(), { { high = {} }, { mean = 1 } }) } },
  randn_like = { cf.randn_like, { t }, { no_tensor(), join(creation(), { { std = NAN }, { low = 1 } }) } },
  from_pointer = { cf.from_pointer, { ffi.new("float[2]"), { 2 } }, { { NIL, 1, "x", {}, t, ffi.new("int64_t", 8), ffi.cast("float *", 0) },
    join(no_shape(), { { 3 } }), join(no_options(), no_dtype(), { { strides = 1 }, { strides = { -1 } }, { strides = { 1, 1 } },
      { strides = { 0.5 } } }) } },
  manual_seed = { cf.manual_seed, { 1 }, { { NIL, -1, 1.5, NAN, INF, "1", {}, 2 ^ 60 } } },
  generator = { cf.generator, { 1 }, { { -1, 1.5, NAN, INF, "1", {}, 2 ^ 60 } } },
  maximum = { cf.maximum, { t, t }, { no_operand(), no_operand() } },
  minimum = { cf.minimum, { t, 1 }, { join(no_operand(), { 2 }), no_operand() } },
  attention = { cf.attention, { four, four, four }, { join(no_tensor(), { t }), join(no_tensor(), { t }), join(no_tensor(), { t }),
    join(no_options(), { { causal = 1 }, { scale = NAN }, { scale = "1" }, { out = 1 }, { out = t }, { out = freed }, { deterministic = 1 } }) } },
  explain = { cf.explain, { four, four, four }, { join(no_tensor(), { t }), join(no_tensor(), { t }), join(no_tensor(), { t }),
    join(no_options(), { { causal = 1 }, { scale = INF }, { pass = "x" }, { pass = 1 } }) } },
  ["reference.attention"] = { cf.reference.attention, { four, four, four }, { join(no_tensor(), { t }), join(no_tensor(), { t }),
    join(no_tensor(), { t }), join(no_options(), { { causal = 1 }, { scale = NAN }, { out = t } }) } },
  gradcheck = { cf.gradcheck, { sum, { t }, { cf.ones_like(t) } }, { { NIL, 1, function() end }, { NIL, 1, t, {}, { 1 }, { freed } },
    { NIL, 1, t, {}, { 1 }, { freed }, { four }, { t, t } }, join(no_options(), { { eps = 0 }, { eps = -1 }, { rtol = NAN }, { atol = "0" },
      { max_elements = 0 }, { max_elements = 0.5 } }) } },
  all_close = { cf.all_close, { t, t }, { no_tensor(), join(no_tensor(), { four }),
    join(no_options(), { { rtol = -1 }, { rtol = NAN }, { atol = "1" }, { atol = INF }, { equal_nan = 1 } }) } },
  equal = { cf.equal, { t, t }, { no_tensor(), no_tensor() } },
  save = { cf.save, { file, t }, { no_path(), no_tensor() } },
  load = { cf.load, { file }, { no_path(), creation() } },
  ["safetensors.save"] = { cf.safetensors.save, { file, { t = t } }, { no_path(), { NIL, 1, t, { t }, { a = 1 }, { a = freed } },
    join(no_options(), { { metadata = 1 }, { metadata = { a = 1 } }, { metadata = { "a" } } }) } },
  ["safetensors.load"] = { cf.safetensors.load, { file }, { no_path(), join(no_options(), no_device(), { { names = 1 }, { names = { 1 } } }) } },
  num_threads = { cf.num_threads, { cf.num_threads() }, { no_count() } },
  synchronize = { cf.synchronize, { "cpu" }, { { 1, "gpu", "cuda:4096", {} } } },
  memory_stats = { cf.memory_stats, { "cpu" }, { { 1, "gpu", "cuda:4096", {} } } },
  memory_reset_peak = { cf.memory_reset_peak, { "cpu" }, { { 1, "gpu", "cuda:4096", {} } } },
  memory_trim = { cf.memory_trim, { "cpu" }, { { 1, "gpu", "cuda:4096", {} } } },
  memory_limit = { cf.memory_limit, { "cpu", 0 }, { { NIL, 1, "gpu", "cuda:4096" }, { NIL, -1, 0.5, NAN, INF, "1" } } },
  memory_soft_limit = { cf.memory_soft_limit, { cf.memory_soft_limit() }, { no_count(), { 1, "gpu", "cuda:4096" } } },

  ["cuda.device_info"] = { cf.cuda.device_info, { "cuda" }, { no_cuda_device() }, cuda = true },
  ["cuda.stream"] = { cf.cuda.stream, { "cuda:0" }, { no_cuda_device() }, cuda = true },
  ["cuda.event"] = { cf.cuda.event, {}, { no_cuda_device() }, cuda = true },
  ["cuda.with_stream"] = { cf.cuda.with_stream, { stream, function() end }, { no_stream(), { NIL, 1, "x", {}, t } }, cuda = true },
  ["stream:handle"] = { Stream.handle, { stream }, { no_stream() }, cuda = true },
  ["stream:synchronize"] = { Stream.synchronize, { stream }, { no_stream() }, cuda = true },
  ["stream:wait"] = { Stream.wait, { stream, event }, { no_stream(), no_event() }, cuda = true },
  ["event:record"] = { Event.record, { event, stream }, { no_event(), { 1, "x", {}, print, t, event } }, cuda = true },
  ["event:synchronize"] = { Event.synchronize, { event }, { no_event() }, cuda = true },
  ["event:elapsed"] = { Event.elapsed, { event, event }, { no_event(), no_event() }, cuda = true },

  ["tensor:size"] = { methods.size, { t, 1 }, { no_tensor(), no_dim(2) } },
  ["tensor:stride"] = { methods.stride, { t, 1 }, { no_tensor(), no_dim(2) } },
  ["tensor:narrow"] = { methods.narrow, { t, 1, 1, 1 }, { no_tensor(), no_dim(2), no_index(2), { NIL, 0, 3, -1, 1.5, NAN, "1" } } },
  ["tensor:select"] = { methods.select, { t, 2, 1 }, { no_tensor(), no_dim(2), no_index(3) } },
  ["tensor:transpose"] = { methods.transpose, { t, 1, 2 }, { no_tensor(), no_dim(2), no_dim(2) } },
  ["tensor:view"] = { methods.view, { t, { 3, -1 } }, { no_tensor(), join(no_shape(), { { 4 }, { -1, -1 }, { 4, -1 } }) } },
  ["tensor:reshape"] = { methods.reshape, { t, { 3, -1 } }, { no_tensor(), join(no_shape(), { { 4 }, { -1, -1 }, { 4, -1 } }) } },
  ["tensor:expand"] = { methods.expand, { t, { 4, 2, 3 } }, { no_tensor(), join(no_shape(), { { 3 }, { 4, 3 }, { -1, 2, 3 } }) } },
  ["tensor:to"] = { methods.to, { t, "f16" }, { no_tensor(),
    { NIL, 1, "int8", "gpu", "cuda:4096", true, { dtype = 1 }, { device = "x" }, { x = 1 }, { "f16" } } } },
  ["tensor:cuda"] = { methods.cuda, { t }, { no_tensor(), { -1, 0.5, "0", NAN, 4096 } }, cuda = true },
  ["tensor:copy_"] = { methods.copy_, { cf.zeros_like(t), t }, { join(no_tensor(), { cf.ones({ 1 }):expand { 2 } }), join(no_tensor(), { four }) } },
  ["tensor:fill_"] = { methods.fill_, { cf.zeros_like(t), 1 }, { join(no_tensor(), { cf.ones({ 1 }):expand { 2 } }), no_number() } },
  ["tensor:zero_"] = { methods.zero_, { cf.zeros_like(t) }, { join(no_tensor(), { cf.ones({ 1 }):expand { 2 } }) } },
  ["tensor:item"] = { methods.item, { cf.ones { 1, 1 } }, { join(no_tensor(), { t }) } },
  ["tensor:maximum"] = { methods.maximum, { t, 1 }, { no_operand(), no_operand() } },
  ["tensor:minimum"] = { methods.minimum, { t, t }, { no_operand(), no_operand() } },
  ["tensor:free"] = { methods.free, { cf.ones { 1 } }, { { NIL, 1, "x", {}, ffi.new("int[2]") } } },
}

for _, name in ipairs { "shape", "dim", "numel", "is_contiguous", "data", "alias", "clone", "contiguous", "cpu", "float", "half",
  "bfloat16", "double", "totable", "abs", "exp", "log", "sqrt" } do
  cases["tensor:" .. name] = { methods[name], { t }, { no_tensor() } }
end
for _, name in ipairs { "abs_", "exp_", "log_", "sqrt_" } do
  cases["tensor:" .. name] = { methods[name], { cf.ones { 2 } }, { join(no_tensor(), { cf.ones({ 1 }):expand { 2 } }) } }
end
for _, name in ipairs { "add_", "sub_", "mul_", "div_" } do
  cases["tensor:" .. name] = { methods[name], { cf.ones { 2, 3 }, t },
    { join(no_tensor(), { cf.ones({ 1 }):expand { 2 } }), join(no_operand(), { four }) } }
end
for _, name in ipairs { "sum", "mean", "max", "min" } do
  cases["tensor:" .. name] = { methods[name], { t, 1 }, { no_tensor(), { 0, 3, -3, 1.5, NAN, "1", {} },
    join(no_options(), { { keepdim = 1 } }) } }
end

local WITHOUT_ARGUMENTS = { ["cpu.isa"] = true, ["cuda.is_available"] = true, ["cuda.device_count"] = true, is_tensor = true }

local source = debug.getinfo(1, "S").short_src

local function show(value)
  if value == NIL then return "nil" end
  if type(value) == "table" then
    local parts = {}
    for key, member in pairs(value) do parts[#parts + 1] = tostring(key) .. "=" .. tostring(member):match("[^\n]*") end
    return "{" .. table.concat(parts, ",") .. "}"
  end
  return (tostring(value):match("[^\n]*$"))
end

-- Calls f with one of its good arguments replaced.
local function try(name, f, good, position, value)
  local arguments, n = { unpack(good, 1, 5) }, math.max(#good, position)
  arguments[position] = value
  if value == NIL then arguments[position] = nil end
  local ok, message = pcall(function() return f(unpack(arguments, 1, n)), 1 end)
  local what = ("%s: argument %d is %s: "):format(name, position, show(value))
  assert.is_false(ok, what .. "no error")
  assert.are.equal("string", type(message), what)
  local file_name, rest = message:match("^([^\n]-):%d+: (.*)$")
  assert.are.equal(source, file_name, what .. message)
  local short = name:gsub("^%a+:", "")
  assert.are.equal(short .. ": ", rest:sub(1, #short + 2), what .. message)
  assert.is_true(#rest > #short + 10, what .. message)
end

describe("bad input", function()
  teardown(function() os.remove(file) end)

  for name, case in pairs(cases) do
    local f, good, wrong = case[1], case[2], case[3]
    it("is refused by " .. name .. ", argument by argument", function()
      if name:find("load") then assert((name:find("safe") and cf.safetensors.save or cf.save)(file, name:find("safe") and { t = t } or t)) end
      local before = helper.live_storages()
      local function run() -- in a frame of its own, which keeps nothing behind
        for position, values in ipairs(wrong) do
          for _, value in ipairs(values) do try(name, f, good, position, value) end
        end
        if has_cuda or not case.cuda then f(unpack(good)) end -- the next good call works
      end
      run()
      local after = helper.live_storages()
      if name == "tensor:free" and helper.device == "cpu" then before = before - 1 end
      assert.are.equal(before, after, name .. " leaks")
    end)
  end

  it("is checked for every public function", function()
    local missing = {}
    local function visit(path, functions)
      for name, f in pairs(functions) do
        if type(f) == "function" then
          if not cases[path .. name] and not WITHOUT_ARGUMENTS[path .. name] then missing[#missing + 1] = path .. name end
        elseif type(f) == "table" then
          visit(path .. name .. ".", f)
        end
      end
    end
    visit("", cf)
    visit("tensor:", methods)
    for class, all in pairs { stream = Stream, event = Event } do
      for name in pairs(all) do
        if not name:find "^__" and not cases[class .. ":" .. name] then missing[#missing + 1] = class .. ":" .. name end
      end
    end
    assert.are.same({}, missing)
  end)

  it("of operators is refused too", function()
    assert.raises_at_caller(function() return t + "x" end, "add: argument 'b': expected a tensor or a number, got 'x'")
    assert.raises_at_caller(function() return {} - t end, "sub: argument 'a'")
    assert.raises_at_caller(function() return t * freed end, "mul: argument 'b': expected a live tensor")
    assert.raises_at_caller(function() return freed / 2 end, "div: argument 'a': expected a live tensor")
    assert.raises_at_caller(function() return -freed end, "unm: argument 'self'")
    assert.raises_at_caller(function() return #freed end, "#: argument 'self'")
    assert.raises_at_caller(function() return #cf.tensor(1) end, "no dimensions has no length")
    assert.raises_at_caller(function() return (cf.tensor(1):size(1)) end, "no dimensions has none to choose")
  end)

  it("of names is answered with a suggestion", function()
    assert.raises_at_caller(function() return t.shpe end, "tensor has no field 'shpe' (did you mean 'shape'?)")
    assert.raises_at_caller(function() t:cotniguous() end, "(did you mean 'contiguous'?)")
    assert.raises_at_caller(function() return t.zzzzzz end, "tensor has no field 'zzzzzz'")
    assert.raises_at_caller(function() t.dtype = "float16" end, "no field 'dtype' that can be set")
    assert.raises_at_caller(function() cf.atention() end, "cuflash has no 'atention' (did you mean 'attention'?)")
    assert.raises_at_caller(function() cf.zeros({ 1 }, { dtpye = "f32" }) end, "zeros: unknown option 'dtpye' (did you mean 'dtype'?)")
    assert.raises_at_caller(function() cf.zeros({ 1 }, { dtype = "flaot16" }) end, "got 'flaot16' (did you mean 'float16'?)")
    assert.raises_at_caller(function() cf.zeros({ 1 }, { whatever = 1 }) end,
      "zeros: unknown option 'whatever' (it takes 'device' and 'dtype')")
    assert.raises_at_caller(function() cf.load("x", { "f32" }) end, "load: expected options by name")
  end)

  it("of a device that is not there is refused with the reason", function()
    if has_cuda then pending("there is a CUDA device") end
    local reason = why_no_cuda
    assert.truthy(reason:find("^device cuda:0: ."), reason)
    assert.are.equal(0, cf.cuda.device_count())
    assert.raises_at_caller(function() cf.zeros({ 1 }, { device = "cuda" }) end, "zeros: " .. reason)
    assert.raises_at_caller(function() t:cuda() end, "cuda: " .. reason)
    assert.raises_at_caller(function() t:to("cuda:1") end, "to: device cuda:1")
    for _, name in ipairs { "stream", "event", "device_info" } do
      local f = cf.cuda[name]
      assert.raises_at_caller(function() f() end, ("cuda.%s: %s"):format(name, reason))
      assert.raises_at_caller(function() f("cuda") end, ("cuda.%s: %s"):format(name, reason))
      assert.raises_at_caller(function() f("cuda:1") end, ("cuda.%s: device cuda:1: "):format(name))
    end
  end)

  it("of CUDA's names is refused by name, with and without CUDA", function()
    assert.raises_at_caller(function() cf.cuda.stream("cpu") end, "cuda.stream: argument 'device': expected 'cuda' or 'cuda:N', got 'cpu'")
    assert.raises_at_caller(function() cf.cuda.event(0) end, "cuda.event: argument 'device': expected 'cuda' or 'cuda:N', got 0")
    assert.raises_at_caller(function() cf.cuda.with_stream(t, sum) end, "cuda.with_stream: argument 'stream': expected a stream, got a float32")
    assert.raises_at_caller(function() cf.cuda.with_stream(stream, 3) end, "cuda.with_stream: argument 'f': expected a function, got 3")
    assert.raises_at_caller(function() Stream.wait(nil, event) end, "wait: argument 'self': expected a stream (methods are called with a colon)")
    assert.raises_at_caller(function() stream:wait(stream) end, "wait: argument 'event': expected an event, got a table")
    assert.raises_at_caller(function() event:record(event) end, "record: argument 'stream': expected a stream, got a table")
    assert.raises_at_caller(function() event:elapsed(setmetatable({}, Event)) end, "elapsed: argument 'later': the event was not recorded yet")
  end)

  it("through pcall and a coroutine is an error like any other", function()
    local ok, message = pcall(cf.zeros, 3)
    assert.is_false(ok)
    assert.truthy(message:find("zeros: argument 'shape'", 1, true))
    ok, message = coroutine.resume(coroutine.create(cf.zeros), 3)
    assert.is_false(ok)
    assert.truthy(message:find("^zeros: argument 'shape'"), message)
  end)
end)
