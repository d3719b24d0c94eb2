-- What attention says it will do, and the workspace it does it in.

local ffi = require "ffi"
local cf = require "cuflash"
local C = require("cuflash.library").C
local attention = require "spec.support.attention"

local passes = { "forward", "backward" }
local codes = { forward = C.CUFLASH_FORWARD, backward = C.CUFLASH_BACKWARD }

local case = attention.case {
  name = "plan", batch = 3, heads = 4, heads_kv = 2, seq_q = 175, seq_k = 210, dim = 40, dim_v = 24, causal = true,
}

local function explain(inputs, options)
  return cf.explain(inputs.q, inputs.k, inputs.v, options)
end

describe("the plan of attention", function()
  it("names the instruction set it runs with, the forced one where one is forced #cpu", function()
    local isa = os.getenv "CUFLASH_CPU_ISA" or ""
    if isa ~= "" then assert.are.equal(isa, cf.cpu.isa()) end
    local names = { baseline = true, avx2 = true, avx512 = true, avx512bf16 = true, amx = true }
    assert.is_true(names[cf.cpu.isa()])
    local plan = explain(attention.make(case, "float32"))
    for _, pass in ipairs(passes) do
      assert.are.equal(cf.cpu.isa(), plan[pass].kernel:match("^cpu (%w+),"))
    end
  end)

  for _, dtype in ipairs(attention.dtypes) do
    it("repeats the problem: " .. dtype, function()
      local inputs = attention.make(case, dtype)
      for _, pass in ipairs(passes) do
        local plan = explain(inputs, { causal = true, scale = 0.125 })[pass]
        assert.are.equal(pass, plan.pass)
        assert.are.equal(dtype .. ", batch 3, heads 4 on 2 KV heads, 175 queries x 210 keys, head dim 40 (v 24), causal, "
          .. "scale 0.125", plan.problem)
      end
      assert.is_truthy(explain(inputs).forward.problem:find("not causal, scale 0.158114", 1, true))
    end)
  end

  it("is of the passes that are asked for", function()
    local inputs = attention.make(case, "float32")
    assert.is_nil(explain(inputs, { pass = "forward" }).backward)
    assert.is_nil(explain(inputs, { pass = "backward" }).forward)
    local both = tostring(explain(inputs))
    assert.is_truthy(both:find("pass: forward", 1, true))
    assert.is_truthy(both:find("pass: backward", 1, true))
  end)

  it("counts no more threads than it may use #cpu", function()
    local threads = cf.num_threads()
    local inputs = attention.make(case, "float32")
    for _, n in ipairs { 1, 3 } do
      cf.num_threads(n)
      assert.are.equal(n, tonumber(explain(inputs).forward.work:match("on (%d+) threads?$")))
    end
    cf.num_threads(threads)
  end)
end)

-- Bytes of workspace that the library asks for.
local function workspace_bytes(pass, tensors)
  local bytes = ffi.new "size_t[1]"
  assert.are.equal(0, tonumber(C.cuflash_attention_workspace(attention.problem(case, tensors), codes[pass], bytes)))
  return tonumber(bytes[0])
end

-- A forward on a CUDA device works in registers and shared memory alone.
local function needs_none(pass)
  return pass == "forward" and attention.device ~= "cpu"
end

describe("the workspace of attention", function()
  -- Outputs of NaN, with everything computed by `run(pass, problem)`.
  local function compute(inputs, dtype, run)
    local tensors = {}
    for name, shape in pairs(attention.shapes(case)) do
      tensors[name] = inputs[name]
        or cf.full(shape, 0 / 0, { dtype = name == "lse" and "float32" or dtype, device = attention.device })
    end
    for _, pass in ipairs(passes) do run(pass, attention.problem(case, tensors), tensors) end
    return tensors
  end

  for _, dtype in ipairs(attention.dtypes) do
    it("is as large as the plan says: " .. dtype, function()
      local inputs = attention.make(case, dtype)
      for _, pass in ipairs(passes) do
        local bytes = workspace_bytes(pass, inputs)
        assert.is_true(bytes > 0 or needs_none(pass))
        assert.are.equal(("%d bytes"):format(bytes), explain(inputs, { causal = true, deterministic = true })[pass].workspace)
      end
    end)

    it("may be the caller's, full of NaN, and is not overrun: " .. dtype, function()
      local inputs = attention.make(case, dtype)
      local got = compute(inputs, dtype, function(pass, p, tensors)
        local floats = workspace_bytes(pass, tensors) / 4
        if needs_none(pass) then
          assert(attention.try(pass, p))
          return
        end
        local buffer = cf.full({ 16 + floats + 16 }, 0 / 0, { device = attention.device })
        local pristine = attention.bits(buffer)
        p.workspace = buffer:narrow(1, 17, floats):data()
        p.workspace_bytes = floats * 4
        assert(attention.try(pass, p))
        local bits = attention.bits(buffer)
        assert(pristine:sub(1, 64) == bits:sub(1, 64), pass .. " wrote before its workspace")
        assert(pristine:sub(-64) == bits:sub(-64), pass .. " wrote behind its workspace")
      end)
      attention.all_same_bits(attention.run(case, inputs), got)
    end)
  end

  it("is refused, with nothing written, where it is too small or not aligned to 64 bytes", function()
    local inputs = attention.make(case, "float32")
    local got = compute(inputs, "float32", function(pass, p, tensors)
      if needs_none(pass) then return end
      local floats = workspace_bytes(pass, tensors) / 4
      local buffer = cf.zeros({ floats + 16 }, { device = attention.device })
      local function refused(first, bytes, what)
        p.workspace, p.workspace_bytes = buffer:narrow(1, first, 1):data(), bytes
        local ok, message = attention.try(pass, p)
        assert.is_nil(ok)
        assert.is_truthy(message:find(what, 1, true), message)
      end
      refused(1, floats * 4 - 1, "'workspace_bytes'")
      refused(1, 0, "'workspace_bytes'")
      refused(2, floats * 4, "'workspace'")
      assert.are.equal(0, buffer:abs():max())
    end)
    for _, name in ipairs(attention.outputs) do
      attention.same_bits(got[name]:clone():fill_(0 / 0), got[name], name)
    end
  end)

  it("grows with the length of the sequences, not with its square", function()
    local function long(seq)
      local inputs = {}
      for name, heads in pairs { q = 4, k = 2, v = 2 } do
        inputs[name] = cf.zeros({ 1, 1, 1, 64 }, { device = attention.device }):expand({ 1, heads, seq, 64 })
      end
      return inputs
    end
    for _, pass in ipairs(passes) do
      local small, large = workspace_bytes(pass, long(2 ^ 17)), workspace_bytes(pass, long(2 ^ 19))
      attention.within(large, 4.5 * small, pass)
    end
  end)
end)
