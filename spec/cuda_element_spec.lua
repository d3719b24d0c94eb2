-- Element-wise work on a CUDA device: the same bits as on the CPU, but for exp, log and the order of sums.

local cf = require "cuflash"
local C = require("cuflash.native").C
local ffi = require "ffi"
local helper = require "spec.helper"
local bits = require "spec.support.bits"

local assert_same, VIEWS, base = bits.assert_same, bits.views, bits.base

local DTYPES = { "float32", "float16", "bfloat16", "float64" }

local on_gpu = helper.on_gpu

-- f makes a tensor on a device; it must be the same on both.
local function assert_same_on_both(what, f, any_nan)
  assert_same(f "cuda", f "cpu", what, any_nan)
end

-- What arithmetic may go wrong on, as a tensor of that many elements.
local SPECIAL = { 0, -0.0, 1, -1, 2.5, 3, 1e-7, -6e-8, 1e-300, -7e120, 65504, 1e38, math.huge, -math.huge, 0 / 0, 5e-324 }
local function special(dtype, device, n, step)
  local values = {}
  for i = 1, n do values[i] = SPECIAL[(i * step) % #SPECIAL + 1] end
  return cf.tensor(values, { dtype = dtype }):to(device)
end

-- ---- Random numbers ----------------------------------------------------------------------------------------

describe("random numbers on a CUDA device #gpu", function()
  local KINDS = {
    { "uniform", C.cuflash_random_uniform, 0, 1 }, { "uniform", C.cuflash_random_uniform, -3, 0.7 },
    { "normal", C.cuflash_random_normal, 0, 1 }, { "normal", C.cuflash_random_normal, 2.5, 0.1 },
  }

  local function draw(view, fill, seed, offset, first, second)
    local generator = ffi.new("cuflash_generator", seed, offset)
    assert.are.equal(C.CUFLASH_SUCCESS, fill(view.handle, generator, first, second))
    return generator.offset
  end

  for _, dtype in ipairs(DTYPES) do
    on_gpu("are the CPU's, bit for bit: " .. dtype, function()
      for _, kind in ipairs(KINDS) do
        for _, n in ipairs { 1, 2, 3, 4, 5, 1023, 1024, 4097, 70001 } do
          for _, offset in ipairs { 0ULL, 1ULL, 4294967295ULL, 18446744073709551610ULL } do
            assert_same_on_both(("%s %s of %d"):format(dtype, kind[1], n), function(device)
              local t = cf.empty({ n }, { dtype = dtype, device = device })
              local moved = draw(t, kind[2], 42, offset, kind[3], kind[4])
              local each = kind[1] == "uniform" and dtype == "float64" and 2 or 4
              assert.is_true(moved == offset + math.ceil(n / each))
              return t
            end)
          end
        end
      end
    end)

    on_gpu("go to views in row-major order: " .. dtype, function()
      for _, kind in ipairs(KINDS) do
        for _, view in ipairs(VIEWS) do
          assert_same_on_both(("%s %s, %s"):format(dtype, kind[1], view[1]), function(device)
            local t = base(dtype, device)
            draw(view[2](t), kind[2], 0x123456789abcdefULL, 5, kind[3], kind[4])
            return t
          end)
        end
      end
    end)
  end

  on_gpu("come from cf.rand and cf.randn", function()
    for _, name in ipairs { "rand", "randn" } do
      assert_same_on_both(name, function(device) return cf[name]({ 33, 7 }, { device = device, generator = cf.generator(3) }) end)
    end
  end)
end)

-- ---- Copies ------------------------------------------------------------------------------------------------

describe("copies on and to a CUDA device #gpu", function()
  for _, from in ipairs(DTYPES) do
    for _, to in ipairs(DTYPES) do
      on_gpu(("convert as the CPU does: %s to %s"):format(from, to), function()
        local source = bits.of_all_kinds(from)
        local expected = source:to(to):clone()
        local there = source:cuda()
        assert_same(there:cpu(), source, "there and back")
        assert_same(there:to(to), expected, "on the device")
        assert_same(cf.empty({ 65536 }, { dtype = to, device = "cuda" }):copy_(source), expected, "to the device")
        assert_same(cf.empty({ 65536 }, { dtype = to }):copy_(there), expected, "from the device")
        assert_same(there:view({ 256, 256 }):transpose(1, 2):to(to):contiguous(),
          source:view({ 256, 256 }):transpose(1, 2):to(to):contiguous(), "turned")
      end)

      on_gpu(("take views of any strides on either side: %s to %s"):format(from, to), function()
        for _, view in ipairs(VIEWS) do
          local what = ("%s, %s to %s"):format(view[1], from, to)
          local function expected()
            local t = base(to, "cpu")
            view[2](t):copy_(view[2](cf.randn({ 24, 20, 6 }, { dtype = from, generator = cf.generator(9) })))
            return t
          end
          for _, devices in ipairs { { "cpu", "cuda" }, { "cuda", "cpu" }, { "cuda", "cuda" } } do
            local source = cf.randn({ 24, 20, 6 }, { dtype = from, device = devices[1], generator = cf.generator(9) })
            local target = base(to, devices[2])
            view[2](target):copy_(view[2](source))
            assert_same(target, expected(), ("%s, %s to %s"):format(what, devices[1], devices[2]))
          end
        end
      end)
    end
  end

  on_gpu("broadcast", function()
    for _, devices in ipairs { { "cpu", "cuda" }, { "cuda", "cpu" }, { "cuda", "cuda" } } do
      for _, shape in ipairs { {}, { 1 }, { 7 }, { 5, 1 }, { 3, 1, 7 }, { 1, 5, 1 } } do
        local source = cf.rand(shape, { dtype = "f16" })
        local target = cf.empty({ 3, 5, 7 }, { device = devices[2] }):copy_(source:to(devices[1]))
        assert_same(target, cf.empty({ 3, 5, 7 }):copy_(source), devices[1] .. " to " .. devices[2])
      end
    end
  end)

  on_gpu("within the same memory read all of it first", function()
    assert_same_on_both("a square and its transpose", function(device)
      local t = cf.arange(1600, { device = device }):view { 40, 40 }
      return t:copy_(t:transpose(1, 2))
    end)
    for shift = 1, 5 do
      assert_same_on_both("shifted by " .. shift, function(device)
        local t = cf.arange(3000, { device = device })
        t:narrow(1, 1 + shift, 2000):copy_(t:narrow(1, 3, 2000))
        return t
      end)
    end
  end)

  on_gpu("set and get single elements", function()
    for _, dtype in ipairs(DTYPES) do
      assert_same_on_both(dtype, function(device)
        local t = base(dtype, device)
        t[{ 3, 4, 5 }] = -1.5
        t:transpose(1, 3)[{ 6, 20, 24 }] = 1 / 3
        assert.are.equal(-1.5, t[{ 3, 4, 5 }])
        assert.are.equal(cf.tensor({ 1 / 3 }, { dtype = dtype }):item(), t[{ 24, 20, 6 }])
        return t
      end)
    end
  end)
end)

-- ---- Arithmetic --------------------------------------------------------------------------------------------

describe("arithmetic on a CUDA device #gpu", function()
  local BINARY = { "ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM" }
  local ok = C.CUFLASH_SUCCESS

  for _, dtype in ipairs(DTYPES) do
    on_gpu("fills and counts through any view: " .. dtype, function()
      for _, view in ipairs(VIEWS) do
        assert_same_on_both("fill, " .. view[1], function(device)
          local t = base(dtype, device)
          view[2](t):fill_(1 / 3)
          return t
        end)
        assert_same_on_both("arange, " .. view[1], function(device)
          local t = base(dtype, device)
          assert.are.equal(ok, C.cuflash_tensor_arange(view[2](t).handle, -3.1, 0.37))
          return t
        end)
      end
    end)

    on_gpu("is the CPU's, bit for bit, on special values: " .. dtype, function()
      for _, other in ipairs(DTYPES) do
        for _, name in ipairs(BINARY) do
          assert_same_on_both(("%s of %s and %s"):format(name, dtype, other), function(device)
            local a, b = special(dtype, device, 17 * 16, 1), special(other, device, 16, 1):view { 16, 1 }
            local out = cf.empty({ 16, 17 }, { dtype = dtype, device = device })
            assert.are.equal(ok, C.cuflash_tensor_binary(C["CUFLASH_" .. name], out.handle, a:view({ 16, 17 }).handle, b.handle))
            return out
          end, true)
        end
      end
      for _, name in ipairs(BINARY) do
        for _, scalar in ipairs(SPECIAL) do
          for _, reversed in ipairs { false, true } do
            assert_same_on_both(("%s and %g"):format(name, scalar), function(device)
              local a = special(dtype, device, 37, 1)
              local out = cf.empty({ 37 }, { dtype = dtype, device = device })
              assert.are.equal(ok, C.cuflash_tensor_binary_scalar(C["CUFLASH_" .. name], out.handle, a.handle, scalar, reversed))
              return out
            end, true)
          end
        end
      end
      for _, name in ipairs { "abs", "sqrt" } do
        assert_same_on_both(name, function(device)
          local t = special(dtype, device, 37, 1)
          return t[name](t)
        end, true)
      end
      assert_same_on_both("neg", function(device) return -special(dtype, device, 37, 1) end, true)
    end)

    on_gpu("takes views of any strides: " .. dtype, function()
      for _, view in ipairs(VIEWS) do
        for _, name in ipairs { "ADD", "DIV" } do
          assert_same_on_both(name .. ", " .. view[1], function(device)
            local function random(seed, kind)
              return cf.randn({ 24, 20, 6 }, { dtype = kind, device = device, generator = cf.generator(seed) })
            end
            local out = base(dtype, device)
            local a, b = view[2](random(1, "f32")), view[2](random(2, dtype))
            assert.are.equal(ok, C.cuflash_tensor_binary(C["CUFLASH_" .. name], view[2](out).handle, a.handle, b.handle))
            return out
          end)
          assert_same_on_both(name .. " in place with a row, " .. view[1], function(device)
            local t = cf.randn({ 24, 20, 6 }, { dtype = dtype, device = device, generator = cf.generator(4) })
            local part = view[2](t)
            local row = part
            for _ = 2, part:dim() do row = row:select(1, 1) end
            assert.are.equal(ok, C.cuflash_tensor_binary(C["CUFLASH_" .. name], part.handle, part.handle, row.handle))
            return t
          end)
        end
        assert_same_on_both("sqrt, " .. view[1], function(device)
          local out = base(dtype, device)
          local a = view[2](cf.rand({ 24, 20, 6 }, { device = device, generator = cf.generator(3) }))
          assert.are.equal(ok, C.cuflash_tensor_unary(C.CUFLASH_SQRT, view[2](out).handle, a.handle))
          return out
        end)
      end
    end)

    on_gpu("has exp and log within a rounding of the CPU's: " .. dtype, function()
      local x = cf.rand({ 5000 }, { dtype = dtype, low = -8, high = 8, generator = cf.generator(6) })
      local bound = ({ float32 = 2 ^ -23, float16 = 2 ^ -10, bfloat16 = 2 ^ -7, float64 = 2 ^ -51 })[dtype]
      local options = { rtol = bound, atol = 0 }
      assert.is_true((cf.all_close(x:cuda():exp():cpu(), x:exp(), options)))
      assert.is_true((cf.all_close(x:abs():cuda():log():cpu(), x:abs():log(), { rtol = bound, atol = 2 ^ -52 })))
      for _, name in ipairs { "exp", "log" } do
        local s = special("float64", "cpu", 16, 1)
        assert.is_true((cf.all_close(s:cuda()[name](s:cuda()):cpu(), s[name](s), { rtol = 2 ^ -51, atol = 0, equal_nan = true })))
      end
    end)
  end

  on_gpu("works in place on overlapping views", function()
    for shift = 1, 5 do
      assert_same_on_both("shifted by " .. shift, function(device)
        local t = cf.arange(5000, { device = device })
        t:narrow(1, 1, 4000):add_(t:narrow(1, 1 + shift, 4000))
        t:narrow(1, 1 + shift, 4000):mul_(t:narrow(1, 1, 4000))
        return t
      end)
    end
    assert_same_on_both("a square and its transpose", function(device)
      local t = cf.arange(1600, { device = device }):view { 40, 40 }
      return t:sub_(t:transpose(1, 2))
    end)
  end)
end)

-- ---- Reductions and comparison -----------------------------------------------------------------------------

describe("reductions on a CUDA device #gpu", function()
  -- Few and many outputs, short and long dimensions: shared by lanes along or across, in one step or two.
  local SHAPES = {
    { 1 }, { 3 }, { 1, 1 }, { 5000 }, { 3, 700, 11 }, { 2, 3, 2, 5 }, { 257, 33 }, { 33, 257 }, { 2, 70001 }, { 70001, 2 }, { 300007 },
    { 300, 3, 500 },
  }

  local function whole_numbers(shape, dtype, device)
    local t = cf.rand(shape, { low = -99, high = 100, generator = cf.generator(11), dtype = "f16" })
    local whole = ffi.new "int8_t[1]"
    local values = t:float()
    local data = values:data()
    for i = 0, t:numel() - 1 do
      whole[0] = data[i]
      data[i] = whole[0]
    end
    return values:to { dtype = dtype, device = device }
  end

  for _, dtype in ipairs(DTYPES) do
    on_gpu("over every dimension are the CPU's where sums are exact: " .. dtype, function()
      for _, shape in ipairs(SHAPES) do
        local host = whole_numbers(shape, dtype, "cpu")
        local there = host:cuda()
        for _, name in ipairs { "sum", "mean", "max", "min" } do
          local what = ("%s of %s"):format(name, table.concat(shape, " x "))
          assert.are.equal(host[name](host), there[name](there), what)
          for dim = 1, #shape do
            assert_same(there[name](there, dim), host[name](host, dim), ("%s over %d"):format(what, dim))
          end
          if #shape > 1 then -- a view: turned, and without its first row
            local function view(t) return t:transpose(1, #shape):narrow(1, shape[#shape] > 1 and 2 or 1, math.max(shape[#shape] - 1, 1)) end
            local a, b = view(there), view(host)
            assert.are.equal(b[name](b), a[name](a), what)
            for dim = 1, #shape do assert_same(a[name](a, dim), b[name](b, dim), ("%s, turned, over %d"):format(what, dim)) end
          end
        end
      end
    end)
  end

  on_gpu("of repeated elements count each", function()
    local t = cf.arange(6, { device = "cuda" }):view({ 1, 6 }):expand { 1000, 6 }
    assert.are.equal(21000, t:sum())
    assert_same(t:sum(1), cf.tensor { 1000, 2000, 3000, 4000, 5000, 6000 }, "sum(1)")
    assert_same(t:sum(2), cf.full({ 1000 }, 21), "sum(2)")
  end)

  on_gpu("are NaN where an element is", function()
    for _, place in ipairs { 1, 777, 300000 } do
      local t = cf.zeros({ 300000 }, { device = "cuda" })
      t[place] = 0 / 0
      for _, name in ipairs { "sum", "mean", "max", "min" } do
        local all, one = t[name](t), t[name](t, 1):item()
        assert.is_true(all ~= all and one ~= one, name)
      end
    end
  end)

  on_gpu("keep sums in float64, the same from run to run", function()
    local host = cf.randn({ 100, 30011 }, { generator = cf.generator(8) })
    local t = host:cuda()
    local sum, over_rows, over_columns = t:sum(), t:sum(1), t:sum(2)
    assert.is_true(math.abs(sum - host:sum()) <= 1e-9)
    assert.is_true((cf.all_close(over_rows:cpu(), host:sum(1), { rtol = 1e-7, atol = 1e-11 })))
    assert.is_true((cf.all_close(over_columns:cpu(), host:sum(2), { rtol = 1e-7, atol = 1e-11 })))
    for _ = 1, 5 do
      assert.are.equal(sum, t:sum())
      assert_same(t:sum(1), over_rows:cpu(), "sum(1)")
      assert_same(t:sum(2), over_columns:cpu(), "sum(2)")
    end
  end)
end)

describe("comparison on a CUDA device #gpu", function()
  local function assert_same_report(a, b, options, what)
    local close, expected = cf.all_close(a, b, options)
    for _, devices in ipairs { { "cuda", "cuda" }, { "cuda", "cpu" }, { "cpu", "cuda" } } do
      local also, report = cf.all_close(a:to(devices[1]), b:to(devices[2]), options)
      assert.are.equal(close, also, what)
      for _, field in ipairs { "numel", "n_bad", "max_abs", "max_rel", "worst_actual", "worst_expected" } do
        local x, y = expected[field], report[field]
        assert.is_true(x == y or (x ~= x and y ~= y), ("%s: %s: expected %s, got %s"):format(what, field, x, y))
      end
      assert.are.same(expected.worst_index, report.worst_index, what)
      local x, y = expected.rel_norm, report.rel_norm
      assert.is_true(x == y or (x ~= x and y ~= y) or math.abs(x - y) <= 1e-12 * x, what)
    end
  end

  on_gpu("reports what the CPU reports", function()
    local a = cf.randn({ 50, 411 }, { generator = cf.generator(1) })
    local noise = cf.randn({ 50, 411 }, { generator = cf.generator(2), std = 1e-3 })
    assert_same_report(a, a, {}, "equal")
    assert_same_report(a, a:half(), {}, "another dtype")
    assert_same_report(a, a + noise, { rtol = 0, atol = 2e-3 }, "noise")
    assert_same_report(a:transpose(1, 2), (a + noise):transpose(1, 2), { rtol = 1e-3, atol = 0 }, "turned")
    assert_same_report(a * 0, a * 0 + 1, { rtol = 0, atol = 0.5 }, "all equally far off: the first is the worst")
    for _, value in ipairs { 0 / 0, math.huge, -math.huge, 1e30 } do
      local b = a:clone()
      b[{ 33, 400 }], b[{ 7, 2 }] = value, value
      assert_same_report(a, b, {}, "expected " .. value)
      assert_same_report(b, a, {}, "actual " .. value)
      assert_same_report(b, b, { equal_nan = true }, "both " .. value)
      assert_same_report(b, b, {}, "both " .. value)
    end
    assert_same_report(cf.tensor(3), cf.tensor(4), {}, "single numbers")
    local large = cf.zeros { 2 ^ 20 }
    local changed = large:clone()
    for _, place in ipairs { 600001, 524289, 300001, 5 } do
      changed[place] = 1
      assert_same_report(large, changed, {}, "the first of several worst")
    end
  end)
end)

-- ---- Large tensors -----------------------------------------------------------------------------------------

describe("a tensor of more than 2^31 elements on a CUDA device #gpu", function()
  local N = 2 ^ 31 + 1024 + 3

  on_gpu("is filled, copied, reduced and compared as any other", function()
    local free, needed = cf.cuda.device_info().free_bytes, 2.2 * 2 * N
    if free < needed then pending(("it has %.1f GiB free, and this takes %.1f"):format(free / 2 ^ 30, needed / 2 ^ 30)) end
    local t = cf.empty({ N }, { dtype = "bf16", device = "cuda" })
    t:fill_(1)
    assert.are.equal(N, t:sum())
    t[N] = 3
    t[2 ^ 31 + 1] = -4
    assert.are.equal(N - 3, t:sum())
    assert.are.equal(3, t:max())
    assert.are.equal(-4, t:min(1):item())

    local u = cf.empty({ N }, { dtype = "f16", device = "cuda" }):copy_(t)
    assert.are.equal(-4, u[2 ^ 31 + 1])
    local close, report = cf.all_close(u, t)
    assert.is_true(close)
    assert.are.equal(N, report.numel)
    u[N] = 4
    close, report = cf.all_close(u, t)
    assert.is_false(close)
    assert.are.same({ N }, report.worst_index)

    -- two columns, the rows of one lie beyond 2^31 elements
    local pairs_of, half = u:narrow(1, 1, N - 1):view { (N - 1) / 2, 2 }, (N - 1) / 2
    pairs_of:select(2, 2):mul_(2)
    assert.are.equal(-4, u[2 ^ 31 + 1])
    assert.are.equal(2, u[2 ^ 31 + 2])
    assert.are.equal(half - 5, pairs_of:select(2, 1):sum())
    assert.are.equal(2 * half, pairs_of:select(2, 2):sum())

    -- the last numbers are those of the CPU from there on
    local generator, last = ffi.new("cuflash_generator", 5, 0), 2 ^ 31
    assert.are.equal(C.CUFLASH_SUCCESS, C.cuflash_random_normal(u.handle, generator, 0, 1))
    local expected = cf.empty({ N - last }, { dtype = "f16" })
    assert.are.equal(C.CUFLASH_SUCCESS,
      C.cuflash_random_normal(expected.handle, ffi.new("cuflash_generator", 5, last / 4), 0, 1))
    assert_same(u:narrow(1, last + 1, N - last), expected, "normal")
    t:free()
    u:free()
  end)
end)
