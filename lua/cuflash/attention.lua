--- Attention: o = softmax(scale * q k^T + mask) v, forward and backward, and which kernel computes it.
-- @module cuflash.attention

local ffi = require "ffi"
local bit = require "bit"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"
local memory = require "cuflash.memory"
local copies = require "cuflash.copies"

local attention = {}

local C = native.C

local problem_type = ffi.typeof "cuflash_attention"

-- The C struct of a problem. It points into the tensors, which the caller keeps alive.
local function problem(q, k, v, options)
  local p = problem_type()
  p.struct_size = ffi.sizeof(problem_type)
  p.q, p.k, p.v = q.handle, k.handle, v.handle
  local flags = 0
  if options.causal then flags = bit.bor(flags, C.CUFLASH_CAUSAL) end
  if options.deterministic then flags = bit.bor(flags, C.CUFLASH_DETERMINISTIC) end
  if options.scale then
    flags = bit.bor(flags, C.CUFLASH_SCALE)
    p.scale = options.scale
  end
  p.flags = flags
  return p
end

-- Runs a pass. Returning the tensors keeps them referenced until the call is over: C holds bare pointers to them.
local function execute(f, p, ...)
  return native.try(f, p), ...
end

-- Checks the inputs and the options that every call has.
local function check_inputs(name, q, k, v, options)
  checks.tensor(name, "q", q)
  checks.tensor(name, "k", k)
  checks.tensor(name, "v", v)
  checks.boolean(name, "causal", options.causal)
  checks.boolean(name, "deterministic", options.deterministic)
  if options.scale ~= nil then checks.finite(name, "scale", options.scale) end
end

-- The outputs get their shape from q and v before C sees the problem, so these two need four dimensions here.
local function check_four(name, argument, tensor, expected)
  if tensor.handle.ndim ~= 4 then
    errors.raise("%s: argument '%s': expected %s, got %s", name, argument, expected,
      handle.shape_text(handle.sizes(tensor)))
  end
end

local Context = {}
Context.__index = Context

--- Whether a value is the context of an attention call.
-- @function is_context
-- @local
function attention.is_context(value)
  return getmetatable(value) == Context
end

local function alias(name, tensor)
  local out = handle.type()
  native.call(name, C.cuflash_tensor_alias, out, tensor)
  handle.share_anchor(out, tensor)
  return out
end

--- Runs a forward pass by one of C's functions and makes its context.
-- @function run
-- @local
function attention.run(kind, q, k, v, options)
  local name = kind.name
  options = checks.options(name, options, kind.options)
  check_inputs(name, q, k, v, options)
  check_four(name, "q", q, "[batch x heads x seq x dim]")
  check_four(name, "v", v, "[batch x heads x seq x dim]")
  local out = options.out
  if out ~= nil then checks.output(name, "out", out) end

  local qh = q.handle
  local batch, heads, seq_q = tonumber(qh.shape[0]), tonumber(qh.shape[1]), tonumber(qh.shape[2])
  local device, dim_v = qh.device, tonumber(v.handle.shape[3])
  local o = out or memory.empty(name, kind.dtype or dtype.of(q), device, { batch, heads, seq_q, dim_v })
  local lse = memory.empty(name, kind.lse_dtype, device, { batch, heads, seq_q })

  local p = problem(q, k, v, options)
  p.o, p.lse = o.handle, lse.handle
  local status = execute(kind.forward, p, q, k, v, o, lse)
  if status ~= 0 then
    lse:free()
    if not out then o:free() end
    native.fail(name)
  end
  local context = {
    kind = kind, lse = lse, causal = options.causal or false, scale = options.scale,
    deterministic = options.deterministic or false,
    -- handles of its own, so that the caller may free his; lse too, though it may be read as ctx.lse
    saved = { alias(name, q), alias(name, k), alias(name, v), alias(name, o) },
  }
  return o, setmetatable(context, Context)
end

-- One output of backward: given by the caller, not wanted (false), or new.
local function gradient(name, argument, given, like, kind)
  if given == false then return nil end
  if given ~= nil then return checks.output(name, argument, given) end
  return memory.empty(name, kind or dtype.of(like), like.handle.device, handle.sizes(like))
end

--- The gradients of q, k and v from the gradient of o. May be called more than once. It reads q, k, v and o again, which
-- the context holds without copying: changing them in between changes the gradients.
-- @tparam Tensor d_o shaped like o
-- @tparam[opt] table options dq, dk, dv: tensors to write to, or false for a gradient that is not wanted
-- @treturn Tensor dq
-- @treturn Tensor dk
-- @treturn Tensor dv
-- @function ctx:backward
function Context:backward(d_o, options)
  if getmetatable(self) ~= Context then
    checks.fail("backward", "self", "the context of an attention call (called as ctx:backward)", self)
  end
  local saved, kind = self.saved, self.kind
  if not saved then errors.raise("backward: the context was freed") end
  checks.tensor("backward", "d_o", d_o)
  if kind.device then d_o = copies.to("backward", d_o, dtype.of(d_o), kind.device) end
  options = checks.options("backward", options, { dq = true, dk = true, dv = true })
  local q, k, v, o = saved[1], saved[2], saved[3], saved[4]
  local dq = gradient("backward", "dq", options.dq, q, kind.dtype)
  local dk = gradient("backward", "dk", options.dk, k, kind.dtype)
  local dv = gradient("backward", "dv", options.dv, v, kind.dtype)

  local p = problem(q, k, v, self)
  p.o, p.lse, p.d_o = o.handle, self.lse.handle, d_o.handle
  if dq then p.dq = dq.handle end
  if dk then p.dk = dk.handle end
  if dv then p.dv = dv.handle end
  local status = execute(kind.backward, p, self, d_o, dq, dk, dv)
  if status ~= 0 then
    for argument, tensor in pairs { dq = dq, dk = dk, dv = dv } do
      if not options[argument] then tensor:free() end
    end
    native.fail("backward")
  end
  return dq, dk, dv
end

--- Gives back what the context keeps alive, ctx.lse included; a clone of it outlives that. Freeing twice is harmless.
-- @function ctx:free
function Context:free()
  if getmetatable(self) ~= Context then
    checks.fail("free", "self", "the context of an attention call (called as ctx:free)", self)
  end
  if not self.saved then return end
  for _, tensor in ipairs(self.saved) do tensor:free() end
  self.saved = nil
  self.lse:free()
end

function Context:__tostring()
  if not self.saved then return "[cf.Context freed]" end
  return ("[cf.Context of %s: q %s, k %s, %s]"):format(self.kind.name, handle.shape_text(handle.sizes(self.saved[1])),
    handle.shape_text(handle.sizes(self.saved[2])), self.causal and "causal" or "not causal")
end

local kernels = {
  name = "attention",
  options = { causal = true, scale = true, out = true, deterministic = true },
  forward = C.cuflash_attention_forward,
  backward = C.cuflash_attention_backward,
  dtype = nil, -- that of q
  device = nil,
  lse_dtype = dtype.float32,
}

--- Attention: softmax(scale * q k^T) v for every batch and head, in O(seq) memory.
-- The dtype is float32, float16 or bfloat16, one for all; the last dimension must be contiguous, the others may have
-- any strides. heads is a multiple of heads_kv: query heads 1 to heads / heads_kv read KV head 1, and so on. A causal query i
-- sees keys up to i + seq_k - seq_q; one that sees none gives o = 0 and lse = -inf.
-- @tparam Tensor q [batch x heads x seq_q x head_dim]
-- @tparam Tensor k [batch x heads_kv x seq_k x head_dim]
-- @tparam Tensor v [batch x heads_kv x seq_k x head_dim_v]
-- @tparam[opt] table options causal (false), scale (1 / sqrt(head_dim)), out (a tensor to write o to),
--   deterministic (false; backward bit-equal from run to run, which the CPU always is)
-- @treturn Tensor o [batch x heads x seq_q x head_dim_v]
-- @treturn Context with ctx.lse [batch x heads x seq_q], float32, ctx:backward(d_o) and ctx:free()
-- @function attention
function attention.attention(q, k, v, options)
  return attention.run(kernels, q, k, v, options)
end

local Plan = {}
Plan.__index = Plan
function Plan:__tostring() return self.text end

local function plan_text(name, pass, q, k, v, options)
  local size = 2048
  local buffer = ffi.new("char[?]", size)
  local p = problem(q, k, v, options)
  native.call(name, C.cuflash_attention_plan, p, pass, buffer, size)
  return ffi.string(buffer)
end

-- "name: value" lines as a table.
local function parse(text)
  local fields = {}
  for key, value in text:gmatch("([^\n:]+): *([^\n]*)") do fields[key] = value end
  return fields
end

--- Says which kernel attention would run and how, without running it. print(cf.explain(q, k, v, {causal = true}))
-- @tparam Tensor q
-- @tparam Tensor k
-- @tparam Tensor v
-- @tparam[opt] table options causal, scale, deterministic; pass: "forward" or "backward", without it both
-- @treturn Plan which prints as text; the tables plan.forward and plan.backward hold its lines by name
-- @function explain
function attention.explain(q, k, v, options)
  local name = "explain"
  options = checks.options(name, options, { causal = true, scale = true, deterministic = true, pass = true })
  check_inputs(name, q, k, v, options)
  local pass = options.pass
  if pass ~= nil and pass ~= "forward" and pass ~= "backward" then
    checks.fail(name, "pass", "'forward' or 'backward'", pass)
  end
  local plan, texts = {}, {}
  for _, which in ipairs { "forward", "backward" } do
    if pass == nil or pass == which then
      local text = plan_text(name, C["CUFLASH_" .. which:upper()], q, k, v, options):gsub("%s+$", "")
      texts[#texts + 1] = text
      plan[which] = parse(text)
    end
  end
  plan.text = table.concat(texts, "\n\n")
  return setmetatable(plan, Plan)
end

return attention
