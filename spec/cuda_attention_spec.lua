-- Attention on a CUDA device, beyond what the attention specs show there: the same bits every time while others use the memory, tensors
-- of more than 2^31 elements, streams, and what runs.

local cf = require "cuflash"
local C = require("cuflash.native").C
local ffi = require "ffi"
local helper = require "spec.helper"
local attention = require "spec.support.attention"
local bits = require "spec.support.bits"

ffi.cdef 'int cuflash_spec_memcmp(const void *a, const void *b, size_t bytes) __asm__("memcmp");'

local on_gpu = helper.on_gpu

local function GiB(bytes) return ("%.1f GiB"):format(bytes / 2 ^ 30) end

-- The inputs of a case, of a dtype, on the device.
local function make(case, dtype)
  local inputs = {}
  for name, tensor in pairs(case.fill(case)) do inputs[name] = tensor:to { dtype = dtype, device = "cuda" } end
  return inputs
end

-- ---- Repeats -----------------------------------------------------------------------------------------------

describe("attention on a CUDA device, while another stream keeps the memory busy #gpu", function()
  local REPEATS = 1000
  local BUSY = 2 ^ 27 -- float32 numbers that are copied beside each repeat

  -- Grouped heads and partial tiles in both directions; several blocks add to each tile of dq. And heads enough for two orders.
  local grouped = { name = "grouped heads", batch = 2, heads = 16, heads_kv = 4, seq_q = 300, seq_k = 520, causal = true }
  local many = { name = "many heads", batch = 2, heads = 24, seq_q = 600, seq_k = 600, causal = true }
  local BYTES = { float32 = 4, bfloat16 = 2 }

  -- Results on the host that are always the same: their bytes, to compare the next ones with.
  local Kept = {}
  Kept.__index = Kept

  function Kept:check(name, tensor, times)
    local expected = self[name]
    if not expected then
      self[name] = { bits = tensor:clone():cpu(), now = cf.empty(tensor:shape(), { dtype = tensor.dtype }) }
      return
    end
    expected.now:copy_(tensor)
    local bytes = tensor:numel() * BYTES[tensor.dtype]
    if ffi.C.cuflash_spec_memcmp(expected.now:data(), expected.bits:data(), bytes) ~= 0 then
      bits.assert_same(expected.now, expected.bits, ("%s of run %d"):format(name, times))
    end
  end

  -- One forward and backward. dq is the same every time only where that is asked for, the rest always.
  local function run(inputs, deterministic, kept, times)
    local o, ctx = cf.attention(inputs.q, inputs.k, inputs.v, { causal = true, deterministic = deterministic })
    local dq, dk, dv = ctx:backward(inputs.d_o)
    kept:check("o", o, times)
    kept:check("lse", ctx.lse, times)
    kept:check("dk", dk, times)
    kept:check("dv", dv, times)
    if deterministic then kept:check("dq", dq, times) end
    for _, done in ipairs { o, dq, dk, dv, ctx } do done:free() end
  end

  for _, kind in ipairs { { "float32", 64, grouped }, { "bfloat16", 64, grouped }, { "bfloat16", 192, grouped },
    { "bfloat16", 64, many }, { "bfloat16", 128, many } } do
    local dtype, dim, shape = unpack(kind)
    on_gpu(("gives the same bits in each of %d runs: %s, %s, head dim %d"):format(REPEATS, shape.name, dtype, dim), function()
      local inputs = make(attention.case(shape, { dim = dim }), dtype)
      local from, to = cf.ones({ BUSY }, { device = "cuda" }), cf.empty({ BUSY }, { device = "cuda" })
      -- neither is the default stream, beside which none would run
      local ours, others = cf.cuda.stream(), cf.cuda.stream()
      local fixed, free = setmetatable({}, Kept), setmetatable({}, Kept) -- deterministic, and not
      for times = 1, REPEATS do
        cf.cuda.with_stream(others, to.copy_, to, from)
        cf.cuda.with_stream(ours, run, inputs, true, fixed, times)
        cf.cuda.with_stream(others, to.copy_, to, from)
        cf.cuda.with_stream(ours, run, inputs, false, free, times)
      end
      others:synchronize()
      for _, name in ipairs { "o", "dq", "dk", "dv" } do -- and they are numbers
        local sum = fixed[name].bits:sum()
        assert.is_true(sum == sum and fixed[name].bits:abs():max() > 0, name)
      end
      from:free()
      to:free()
    end)
  end
end)

-- ---- Parts -------------------------------------------------------------------------------------------------

describe("a backward whose tiles of keys are dealt out to several blocks each #gpu", function()
  local ALL, LAST, LAST_ONE = " to a tile of keys,", " to each of the last 3 tiles of keys,", " to the last tile of keys,"
  local multiprocessors = cf.cuda.is_available() and cf.cuda.device_info().multiprocessors or 1

  -- plan: what the plan says of the grid.
  local cases = {
    { name = "heads of a group, unevenly", plan = ALL, heads = 63, heads_kv = 9, seq_q = 700, seq_k = 711, dim = 32, causal = true },
    { name = "heads of a group, and their queries", plan = ALL, heads = 3, heads_kv = 1, seq_q = 700, seq_k = 150, dim = 64 },
    { name = "queries", plan = ALL, heads = 2, seq_q = 1100, seq_k = 290, dim = 128, dim_v = 40 },
    { name = "queries, causal", plan = ALL, heads = 1, batch = 2, seq_q = 1100, seq_k = 1100, dim = 80, causal = true },
    { name = "more queries than keys, causal", plan = ALL, heads = 2, seq_q = 1100, seq_k = 290, dim = 64, causal = true },
    { name = "queries of the last tiles", plan = LAST, heads = multiprocessors + 3, seq_q = 520, seq_k = 20, dim = 72 },
    { name = "queries of a group's last tile", plan = LAST_ONE, batch = 3 * multiprocessors + 1, heads = 2, heads_kv = 1, seq_q = 200,
      seq_k = 20, dim = 96 },
  }

  for _, case in ipairs(cases) do
    case = attention.case(case)
    for _, dtype in ipairs { "float32", "bfloat16" } do
      on_gpu(("has the oracle's gradients: %s, %s"):format(case.name, dtype), function()
        local inputs = make(case, dtype)
        local grid = cf.explain(inputs.q, inputs.k, inputs.v, { causal = case.causal }).backward.grid
        assert.is_truthy(grid:find(case.plan, 1, true), grid)
        attention.check(case, dtype, inputs, attention.run(case, inputs))
      end)
    end
  end
end)

-- ---- Every row of the table ----------------------------------------------------------------------------------

-- Logits of keys get larger and larger, up to 10 times as large, towards the last key or the first.
local function growing(to_the_last)
  return function(case)
    local inputs, n = attention.normal(case), case.seq_k
    local rows = to_the_last and cf.arange(1, n) or cf.arange(n - 1, 0, -1)
    inputs.k:mul_((rows * (9 / n) + 1):view { n, 1 })
    return inputs
  end
end

describe("a forward of few keys or many #gpu", function()
  local KERNELS = { [64] = 2, [128] = 2 } -- on sm_90, of a head dimension
  local values = { { "normal logits", "bfloat16" }, { "logits that grow", "float16", growing(true) },
    { "logits that fall", "float16", growing(false) } }

  for dim, kernels in pairs(KERNELS) do
    local seen, count = {}, 0
    for _, seq_k in ipairs { 450, 1000, 1500, 2100 } do
      for _, causal in ipairs { false, true } do
        for _, value in ipairs(values) do
          local case = attention.case { name = value[1], heads = 2, heads_kv = 1, seq_q = 90, seq_k = seq_k, dim = dim, causal = causal,
            fill = value[3], bound = value[3] and attention.cancelling_bound }
          local mask = causal and ", causal" or ""
          on_gpu(("has the oracle's results: %s, %d keys%s, head dim %d"):format(case.name, seq_k, mask, dim), function()
            local inputs = make(case, value[2])
            local kernel = cf.explain(inputs.q, inputs.k, inputs.v, { causal = causal }).forward.kernel:gsub("_b?f16_", "_")
            if not seen[kernel] then seen[kernel], count = true, count + 1 end
            attention.check(case, value[2], inputs, attention.run(case, inputs))
          end)
        end
      end
    end
    on_gpu(("has every kernel for Hopper run, head dim %d"):format(dim), function()
      if cf.cuda.device_info().compute ~= 90 then pending "this is no Hopper" end
      assert.are.equal(kernels, count)
    end)
  end
end)

-- ---- Blocks that stay ----------------------------------------------------------------------------------------

describe("a backward whose blocks may go from tile to tile #gpu", function()
  local multiprocessors = cf.cuda.is_available() and cf.cuda.device_info().multiprocessors or 1
  local shapes = {
    { name = "several tiles to a block", heads = 2 * multiprocessors, seq_q = 65, seq_k = 129 },
    { name = "several tiles to a block, causal", heads = 2 * multiprocessors, seq_q = 130, seq_k = 129, causal = true },
    { name = "heads of a group", batch = 2, heads = 12, heads_kv = 3, seq_q = 300, seq_k = 300, causal = true },
    { name = "several blocks to a tile", heads = 1, seq_q = 1100, seq_k = 1100, causal = true },
    { name = "keys enough to make dq in the same blocks", heads = 4, heads_kv = 2, seq_q = 300, seq_k = 1100 },
    { name = "keys enough for that, causal", batch = 2, heads = 3, seq_q = 700, seq_k = 1100, causal = true },
    { name = "one query", heads = 5, seq_q = 1, seq_k = 20 },
    { name = "queries that see nothing", heads = 3, seq_q = 400, seq_k = 150, causal = true },
    -- on sm_90, up to these head dimensions
    { name = "the last keys first", heads = 70, seq_q = 300, seq_k = 420, causal = true, last_first = 256 },
    { name = "the last keys first, a head of a group to a block", heads = 64, heads_kv = 16, seq_q = 300, seq_k = 420,
      causal = true, last_first = 256 },
    { name = "the last keys first, heads of a group", heads = 240, heads_kv = 120, seq_q = 300, seq_k = 300, causal = true,
      last_first = 64 },
  }

  for _, shape in ipairs(shapes) do
    for _, dims in ipairs { { 64, 64 }, { 128, 128 }, { 136, 64 }, { 192, 192 }, { 200, 256 } } do
      local case = attention.case(shape, { dim = dims[1], dim_v = dims[2] })
      on_gpu(("has the oracle's gradients, in order or not: %s, head dims %d and %d"):format(case.name, unpack(dims)), function()
        local inputs = make(case, "bfloat16")
        if shape.last_first and cf.cuda.device_info().compute == 90 then
          local grid = cf.explain(inputs.q, inputs.k, inputs.v, { causal = true, deterministic = true }).backward.grid
          assert.are.equal(dims[1] <= shape.last_first, grid:find("the last keys first", 1, true) ~= nil, grid)
        end
        for _, deterministic in ipairs { true, false } do
          attention.check(case, "bfloat16", inputs, attention.run(case, inputs, deterministic))
        end
      end)
    end
  end
end)

describe("a forward whose blocks may go from tile to tile #gpu", function()
  local multiprocessors = cf.cuda.is_available() and cf.cuda.device_info().multiprocessors or 1
  local many = 3 * multiprocessors -- heads that have more tiles than there are blocks
  local values = { { "bfloat16" }, { "float16", growing(true) } }
  -- `together`: heads of a group that are in a tile on sm_90
  local shapes = {
    { name = "not causal", heads = many + 1, seq_q = 130, seq_k = 70 },
    { name = "causal", heads = many + 1, seq_q = 130, seq_k = 130, causal = true },
    { name = "causal, an odd number of tiles", heads = many - 5, seq_q = 300, seq_k = 310, causal = true },
    { name = "causal, many keys", heads = multiprocessors + 1, seq_q = 200, seq_k = 1100, causal = true },
    { name = "queries that see nothing", heads = many + 7, seq_q = 150, seq_k = 40, causal = true },
    { name = "a query, heads of a group in a tile", batch = many, heads = 16, heads_kv = 2, seq_q = 1, seq_k = 70, together = 8 },
    { name = "some queries, two heads in a tile", batch = many, heads = 4, heads_kv = 2, seq_q = 9, seq_k = 150, causal = true,
      together = 2 },
    { name = "64 heads in a tile", batch = math.ceil(many / 32), heads = 64, heads_kv = 1, seq_q = 3, seq_k = 90, causal = true,
      together = 64 },
    { name = "heads in several tiles", batch = math.ceil(many / 56), heads = 64, heads_kv = 8, seq_q = 37, seq_k = 60, causal = true,
      together = 8 },
    { name = "heads in a tile, many keys", batch = math.ceil(multiprocessors / 28), heads = 32, heads_kv = 4, seq_q = 5, seq_k = 1100,
      causal = true, together = 8 },
    { name = "heads in a tile, queries that see nothing", batch = many, heads = 4, heads_kv = 1, seq_q = 9, seq_k = 5, causal = true,
      together = 4 },
    { name = "a group of 3, which no tile holds", batch = many, heads = 6, heads_kv = 2, seq_q = 2, seq_k = 70 },
  }

  for _, shape in ipairs(shapes) do
    for i, dims in ipairs { { 64, 64 }, { 96, 40 }, { 128, 128 }, { 192, 64 }, { 256, 256 } } do
      local value = values[i % 2 + 1]
      local case = attention.case(shape, { dim = dims[1], dim_v = dims[2], fill = value[2],
        bound = value[2] and attention.cancelling_bound })
      on_gpu(("has the oracle's results: %s, head dims %d and %d, %s"):format(case.name, dims[1], dims[2], value[1]), function()
        local inputs = make(case, value[1])
        local tile = cf.explain(inputs.q, inputs.k, inputs.v, { causal = case.causal }).forward.tile
        if cf.cuda.device_info().compute == 90 then
          assert.are.equal(shape.together and ("of %d heads"):format(shape.together), tile:match "of %d+ heads")
        end
        local got = attention.run(case, inputs)
        attention.check(case, value[1], inputs, got)
        local first = got.o:cpu()
        for times = 1, 3 do
          local again = cf.attention(inputs.q, inputs.k, inputs.v, { causal = case.causal })
          bits.assert_same(again, first, ("o of run %d"):format(times))
        end
        for _, name in ipairs { "q", "k", "v" } do -- [batch, seq, heads, dim] in memory
          inputs[name] = inputs[name]:transpose(2, 3):contiguous():transpose(2, 3)
        end
        bits.assert_same((cf.attention(inputs.q, inputs.k, inputs.v, { causal = case.causal })), first, "o by sequence")
      end)
    end
  end
end)

-- ---- Beyond 2^31 elements ----------------------------------------------------------------------------------

describe("attention on views that reach beyond 2^31 elements of a CUDA tensor #gpu", function()
  local DIM, SEQ_Q, SEQ_K = 64, 113, 300
  local LONG = 2 ^ 24 + 37 -- rows of DIM: two of them are more than 2^31 elements
  local SLOTS = { q = 1, k = 2, v = 3, o = 4, d_o = 5, dq = 6, dk = 7, dv = 8 }

  -- The sequences of all tensors, one after the other, at the end of dimension 3.
  local function at_the_end(base, slot, seq)
    return base:narrow(3, LONG - 8 * SEQ_K + (slot - 1) * SEQ_K + 1, seq)
  end

  -- base: the shape of the whole; place(base, slot, seq, heads): the [batch x heads x seq x dim] view of one of eight tensors in it.
  local layouts = {
    { name = "rows", base = { 1, SEQ_K, 2 ^ 17, DIM }, heads = 4, heads_kv = 2, place = function(base, slot, seq, heads)
      return base:narrow(2, SEQ_K - seq + 1, seq):narrow(3, 4 * slot + 1, heads):transpose(2, 3)
    end },
    { name = "heads", base = { 1, 3, LONG, DIM }, heads = 3, place = at_the_end },
    { name = "batch elements", base = { 3, 1, LONG, DIM }, batch = 3, heads = 1, place = at_the_end },
  }

  for _, layout in ipairs(layouts) do
    on_gpu(("gives the bits of compact tensors, with %s that far apart"):format(layout.name), function()
      local needed, free = 2 ^ 29, cf.cuda.device_info().free_bytes
      local elements = 1
      for _, size in ipairs(layout.base) do elements = elements * size end
      assert.is_true(elements > 2 ^ 31)
      needed = needed + 2 * elements
      if free < needed then pending(("the device has %s free, and this takes %s"):format(GiB(free), GiB(needed))) end

      local case = attention.case {
        name = "beyond 2^31 elements", batch = layout.batch, heads = layout.heads, heads_kv = layout.heads_kv, seq_q = SEQ_Q,
        seq_k = SEQ_K, dim = DIM, causal = true,
      }
      -- NaN around and between: an address that lost its upper bits finds nothing else
      local base = cf.empty(layout.base, { dtype = "float16", device = "cuda" }):fill_(0 / 0)
      local shapes, far = attention.shapes(case), {}
      for name, slot in pairs(SLOTS) do
        far[name] = layout.place(base, slot, shapes[name][3], shapes[name][2])
        assert.are.same(shapes[name], { unpack(far[name]:shape()) })
      end
      local compact = make(case, "float16")
      for name, tensor in pairs(compact) do far[name]:copy_(tensor) end

      local function run(t, outputs)
        local o, ctx = cf.attention(t.q, t.k, t.v, { causal = true, deterministic = true, out = outputs.o })
        local dq, dk, dv = ctx:backward(t.d_o, { dq = outputs.dq, dk = outputs.dk, dv = outputs.dv })
        return { o = o, lse = ctx.lse, dq = dq, dk = dk, dv = dv }
      end
      local expected, got = run(compact, {}), run(far, far)
      for _, name in ipairs(attention.outputs) do
        local host = expected[name]:cpu()
        assert.is_true(host:sum() == host:sum(), name .. " of the compact tensors is NaN")
        bits.assert_same(got[name], host, name)
      end
      for name, tensor in pairs(compact) do bits.assert_same(far[name], tensor:cpu(), name .. ", which is only read,") end
      for _, tensor in pairs(far) do tensor:free() end
      base:free()
    end)
  end
end)

-- ---- Streams -----------------------------------------------------------------------------------------------

-- The stream that work of this thread goes to.
local function current()
  local stream = C.cuflash_set_stream(nil)
  C.cuflash_set_stream(stream)
  return stream
end

describe("CUDA streams #gpu", function()
  on_gpu("give the results of the default stream", function()
    local problems = {}
    for i, row in ipairs {
      { name = "first", batch = 2, heads = 4, heads_kv = 2, seq_q = 700, seq_k = 900, dim = 64, causal = true },
      { name = "second", batch = 1, heads = 6, seq_q = 513, seq_k = 257, dim = 128 },
    } do
      local case = attention.case(row)
      for _, dtype in ipairs(attention.dtypes) do
        local inputs = make(case, dtype)
        problems[#problems + 1] = { case = case, inputs = inputs, dtype = dtype, stream = i, expected = attention.run(case, inputs) }
      end
    end
    local streams, results = { cf.cuda.stream(), cf.cuda.stream() }, {}
    for _ = 1, 10 do
      for _, p in ipairs(problems) do
        results[#results + 1] = { p, cf.cuda.with_stream(streams[p.stream], attention.run, p.case, p.inputs) }
      end
    end
    for _, stream in ipairs(streams) do stream:synchronize() end
    for _, result in ipairs(results) do
      attention.all_same_bits(result[1].expected, result[2], ("of the %s case in %s"):format(result[1].case.name, result[1].dtype))
    end
  end)

  on_gpu("wait for each other's events", function()
    local n, steps = 2 ^ 24, 200
    local first, second, done = cf.cuda.stream(), cf.cuda.stream(), cf.cuda.event()
    local x, y = cf.zeros({ n }, { device = "cuda" }), cf.zeros({ n }, { device = "cuda" })
    cf.synchronize "cuda"
    cf.cuda.with_stream(first, function()
      for _ = 1, steps do x:add_(1) end
      done:record()
    end)
    assert.are.equal(second, second:wait(done))
    cf.cuda.with_stream(second, function() y:copy_(x) end)
    second:synchronize()
    assert.are.equal(steps, y:min())
    assert.are.equal(steps, y:max())
  end)

  on_gpu("are measured by events", function()
    local stream, start, finish = cf.cuda.stream(), cf.cuda.event(), cf.cuda.event()
    local x = cf.zeros({ 2 ^ 24 }, { device = "cuda" })
    start:record(stream)
    cf.cuda.with_stream(stream, function()
      for _ = 1, 20 do x:add_(1) end
    end)
    assert.are.equal(finish, finish:record(stream))
    assert.are.equal(finish, finish:synchronize())
    local milliseconds = start:elapsed(finish)
    assert.is_true(milliseconds > 0 and milliseconds < 10000, tostring(milliseconds))
    assert.raises_at_caller(function() start:elapsed(cf.cuda.event()) end, "elapsed: argument 'later': the event was not recorded yet")
    assert.are.equal("[cf.Stream cuda:0]", tostring(stream))
    assert.are.equal("[cf.Event cuda:0]", tostring(start))
  end)

  on_gpu("hold within with_stream only, which passes on what its function returns and raises", function()
    local outer, inner = cf.cuda.stream(), cf.cuda.stream()
    assert.is_true(current() == nil)
    local function count(...) return select("#", ...), ... end
    local n, a, b, c = count(cf.cuda.with_stream(outer, function(x, y)
      assert.is_true(current() == outer:handle())
      cf.cuda.with_stream(inner, function() assert.is_true(current() == inner:handle()) end)
      assert.is_true(current() == outer:handle())
      return x, nil, y
    end, 1, 2))
    assert.are.same({ 3, 1, nil, 2 }, { n, a, b, c })
    assert.is_true(current() == nil)
    local problem = {}
    local ok, raised = pcall(cf.cuda.with_stream, outer, function() cf.cuda.with_stream(inner, error, problem) end)
    assert.is_false(ok)
    assert.are.equal(problem, raised)
    assert.is_true(current() == nil)
  end)
end)

-- ---- What runs ---------------------------------------------------------------------------------------------

describe("a CUDA device #gpu", function()
  on_gpu("tells what it is", function()
    local info = cf.cuda.device_info()
    assert.is_true(#info.name > 0)
    assert.is_true(info.compute >= 70 and info.compute == math.floor(info.compute))
    assert.is_true(info.multiprocessors > 0 and info.shared_bytes >= 48 * 1024)
    assert.is_true(info.free_bytes > 0 and info.free_bytes <= info.total_bytes)
    assert.truthy(info.driver:find "^%d+%.%d+$")
    assert.truthy(info.toolkit:find "^%d+%.%d+$")
    assert.are.equal(info.name, cf.cuda.device_info("cuda:0").name)
    assert.is_true(cf.cuda.device_count() >= 1)
    assert.raises_at_caller(function() cf.cuda.device_info(("cuda:%d"):format(cf.cuda.device_count())) end, "cuda.device_info: device cuda:")
  end)

  on_gpu("says what it has where memory runs out, and lives on", function()
    local info = cf.cuda.device_info()
    local too_many = 2 * math.floor(info.total_bytes / 4)
    assert.raises_at_caller(function() cf.empty({ too_many }, { device = "cuda" }) end, "empty: cannot allocate "
      .. ("%.2f GiB"):format(4 * too_many / 2 ^ 30) .. " on cuda:0, which has ")
    assert.are.equal(3, cf.ones({ 3 }, { device = "cuda" }):sum())
  end)
end)

describe("the plan of attention on a CUDA device #gpu", function()
  local function explain(dtype, dim, options)
    local q = cf.empty({ 2, 6, 300, dim }, { dtype = dtype, device = "cuda" })
    local k = cf.empty({ 2, 3, 500, dim }, { dtype = dtype, device = "cuda" })
    return cf.explain(q, k, k, options)
  end

  on_gpu("shows device, kernel, tile, stages, threads, shared memory and grid", function()
    local info = cf.cuda.device_info()
    for _, dtype in ipairs(attention.dtypes) do
      local suffix = ({ float32 = "f32", float16 = "f16", bfloat16 = "bf16" })[dtype]
      for _, dim in ipairs { 1, 31, 32, 64, 96, 128, 160, 192, 256 } do
        local plan = explain(dtype, dim)
        for pass, lines in pairs { forward = plan.forward, backward = plan.backward } do
          local family = info.compute < 80 and "fma" or dtype ~= "float32" and "mma" or pass == "forward" and "tf32" or "fma"
          if family == "mma" and info.compute == 90 and dim % 8 == 0 then family = "hopper" end
          if family == "tf32" and dim > 128 and lines.kernel:find "_fma_" then family = "fma" end -- not enough shared memory
          local what = ("%s, head dim %d, %s:\n%s"):format(dtype, dim, pass, tostring(plan))
          assert.are.equal(("cuda:0, %s (sm_%d, %d multiprocessors)"):format(info.name, info.compute, info.multiprocessors), lines.device)
          local width, block_m, block_n = lines.kernel:match(("^cuflash_%s_%s_%s_d(%%d+)_(%%d+)x(%%d+) %%("):format(family, pass, suffix))
          assert.is_truthy(width, what)
          assert.is_true(tonumber(width) >= dim, what)
          assert.are.equal(("%s queries x %s keys, head dim %s"):format(block_m, block_n, width), lines.tile)
          assert.is_true(tonumber(lines.stages) >= 1, what)
          assert.is_true(tonumber(lines.threads) % 32 == 0 and tonumber(lines.threads) <= 1024, what)
          local shared = tonumber(lines["shared memory"]:match "^(%d+) bytes$")
          assert.is_true(shared > 0 and shared <= info.shared_bytes, what)
          local blocks = pass == "forward" and math.ceil(300 / block_m) * 6 * 2 or math.ceil(500 / block_n) * 3 * 2
          local tiles = lines.grid:match(", for (%d+) tiles of " .. (pass == "forward" and "queries" or "keys"))
          assert.are.equal(tiles or tostring(blocks), tostring(blocks), what)
          local parts = lines.grid:match ", (%d+) to " or 1
          local last = lines.grid:match " to each of the last (%d+) tiles" or lines.grid:find " to the last tile" and 1 or blocks
          assert.is_true(tonumber(parts) == 1 or pass == "backward", what)
          blocks = blocks + (parts - 1) * last
          local cluster, each = lines.grid:match "in clusters of (%d+)" or 1, lines.threads == "256" and 3 or 1 -- on a multiprocessor
          if family == "hopper" then -- they stay
            blocks = math.min(blocks, math.floor(info.multiprocessors / cluster) * each) * cluster
          end
          assert.are.equal(blocks, tonumber(lines.grid:match "^(%d+) blocks"), what)
        end
      end
    end
  end)

  on_gpu("tells whether the order of additions to dq is fixed", function()
    assert.truthy(explain("float16", 64).backward.grid:find("in any order", 1, true))
    assert.truthy(explain("float16", 64, { deterministic = true }).backward.grid:find("in a fixed order", 1, true))
  end)

  on_gpu("refuses what has no kernel, by name", function()
    for _, dtype in ipairs(attention.dtypes) do
      assert.raises_at_caller(function() explain(dtype, 257) end,
        "explain: argument 'q': expected a head dimension of 1 to 256 on this device")
    end
  end)

  -- The variable is read once a process.
  local function forced(family, code)
    cf.memory_trim() -- the other process needs room for itself
    local output, status = helper.luajit([[
      local cf = require "cuflash"
      local function make(dtype, dim)
        return cf.randn({ 1, 2, 130, dim or 64 }, { dtype = dtype, device = "cuda", generator = cf.generator(1) })
      end
    ]] .. code, ("CUFLASH_LIB=%s CUFLASH_CUDA_FAMILY=%s"):format(helper.quote(cf.library_path), helper.quote(family)))
    return output, status
  end

  on_gpu("is of the family that CUFLASH_CUDA_FAMILY names, and so is what runs", function()
    local output, status = forced("fma", [[
      for _, dtype in ipairs { "float32", "float16", "bfloat16" } do
        for _, dim in ipairs { 1, 64, 128, 256 } do
          local q = make(dtype, dim)
          print((tostring(cf.explain(q, q, q).forward.kernel):match "^cuflash_%a+_"), (cf.explain(q, q, q).backward.kernel:match "^cuflash_%a+_"))
        end
      end
      local q = make "float32"
      print(cf.all_close(cf.attention(q, q, q):cpu(), (cf.reference.attention(q, q, q)), { rtol = 1e-5, atol = 1e-5 }))]])
    assert.are.equal(0, status, output)
    local lines = {}
    for line in output:gmatch "[^\n]+" do lines[#lines + 1] = line end
    for i = 1, 12 do assert.are.equal("cuflash_fma_\tcuflash_fma_", lines[i]) end
    assert.truthy(lines[13] and lines[13]:find "^true\tclose", output)
  end)

  on_gpu("is of one of the families that CUFLASH_CUDA_FAMILY names, if there are more", function()
    local output, status = forced("fma,mm,mma", [[
      local q = make "float16"
      print(cf.explain(q, q, q).forward.kernel)]])
    assert.are.equal(0, status, output)
    local family = cf.cuda.device_info().compute < 80 and "fma" or "mma"
    assert.truthy(output:find("^cuflash_" .. family .. "_"), output)
  end)

  on_gpu("may have a forward alone", function()
    if cf.cuda.device_info().compute < 80 then pending "tf32 needs sm_80" end
    local output, status = forced("tf32", [[
      local q = make "float32"
      local o, ctx = cf.attention(q, q, q)
      print(select(2, pcall(ctx.backward, ctx, o)))]])
    assert.are.equal(0, status, output)
    assert.truthy(output:find("'tf32', which has no kernel for a backward in float32 on sm_", 1, true), output)
  end)

  on_gpu("is an error where that family has no kernel for the problem", function()
    for _, row in ipairs { { "mma", "float32" }, { "nonsense", "float16" }, { "nonsense", "float32" } } do
      local output, status = forced(row[1], ([[
        local q = make %q
        for _, f in ipairs { cf.explain, cf.attention } do print(select(2, pcall(f, q, q, q))) end]]):format(row[2]))
      assert.are.equal(0, status, output)
      local said = ("the environment variable CUFLASH_CUDA_FAMILY is '%s', which has no kernel for a forward in %s on sm_%d"):format(row[1], row[2],
        cf.cuda.device_info().compute)
      for _, name in ipairs { "explain", "attention" } do assert.truthy(output:find(name .. ": " .. said, 1, true), output) end
    end
  end)
end)
