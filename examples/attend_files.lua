-- Attention on tensors from files: q, k and v from three .npy files (NumPy writes them) or from one .safetensors file, and
-- the result back into a file. Without arguments it demonstrates itself in a temporary directory.
--
--     luajit examples/attend_files.lua q.npy k.npy v.npy --causal --out o.npy
--     luajit examples/attend_files.lua in.safetensors --out out.safetensors

-- Finds support/ beside this file, and the repository's cuflash where none is installed.
local here = arg[0]:match "^(.*/)" or "./"
package.path = here .. "?.lua;" .. package.path .. ";" .. here .. "../lua/?.lua;" .. here .. "../lua/?/init.lua"

local cf = require "cuflash"
local arguments = require "support.arguments"
local clock = require "support.clock"

local options = arguments.parse {
  usage = "attend_files.lua [Q.npy K.npy V.npy | IN.safetensors] [options]",
  about = "Attention on q [batch x heads x seq x dim], k and v from files. A .safetensors file holds the tensors q, k\n"
    .. "and v. Without files it writes, attends and checks a small example in a temporary directory.",
  positional = 3,
  { "--causal", nil, "a query sees no keys after its own place" },
  { "--scale", "X", "of the scores (default: 1 / sqrt(dim))", least = -math.huge },
  { "--dtype", "NAME", "convert to this first", among = { "float32", "float16", "bfloat16" } },
  { "--out", "FILE", "write o there; a .safetensors file gets o and lse" },
  { "--lse", "FILE.npy", "write the log-sum-exp there" },
}

local function is_safetensors(path)
  return path:find "%.safetensors$" ~= nil
end

-- What load and save return, or the end of the program where that is nil and a message.
local function loaded(value, message)
  return value or arguments.fail(message)
end

-- ---- Reading and writing -----------------------------------------------------------------------------

local function read_npy(paths)
  local tensors = {}
  for i, path in ipairs(paths) do tensors[i] = loaded(cf.load(path, { dtype = options.dtype, device = options.device })) end
  return unpack(tensors)
end

local function read_safetensors(path)
  local tensors = loaded(arguments.try(cf.safetensors.load, path, { names = { "q", "k", "v" }, device = options.device }))
  local function get(name)
    return options.dtype and tensors[name]:to { dtype = options.dtype } or tensors[name]
  end
  return get "q", get "k", get "v"
end

local function read(paths)
  if #paths == 3 then return read_npy(paths) end
  if #paths == 1 and is_safetensors(paths[1]) then return read_safetensors(paths[1]) end
  return arguments.fail("expected three .npy files or one .safetensors file; see attend_files.lua --help", 2)
end

local function write(path, o, lse)
  if is_safetensors(path) then
    loaded(arguments.try(cf.safetensors.save, path, { o = o, lse = lse }))
    print(("wrote  %s"):format(path))
  elseif o.dtype == "bfloat16" then
    loaded(cf.save(path, o:float()))
    print(("wrote  %s, as float32: .npy has no bfloat16"):format(path))
  else
    loaded(cf.save(path, o))
    print(("wrote  %s"):format(path))
  end
end

-- ---- Attention ---------------------------------------------------------------------------------------

local function check_dtypes(q, k, v)
  for i, tensor in ipairs { q, k, v } do
    local name = ("qkv"):sub(i, i)
    if tensor.dtype == "float64" then
      arguments.fail(("%s is float64, which the kernels do not compute in; add --dtype float32"):format(name))
    elseif tensor.dtype ~= q.dtype then
      arguments.fail(("q is %s but %s is %s; add --dtype to convert them to one"):format(q.dtype, name, tensor.dtype))
    end
  end
end

local function summarize(name, tensor)
  print(("%-4s %-24s from %9.4g to %9.4g, mean %9.4g"):format(name, tensor:shape(), tensor:min(), tensor:max(), tensor:mean()))
end

-- Attends, says how it went, and returns the result.
local function attend(q, k, v)
  check_dtypes(q, k, v)
  local how = { causal = options.causal, scale = options.scale }
  local start = clock()
  local o, ctx = arguments.try(cf.attention, q, k, v, how)
  cf.synchronize()
  local milliseconds = (clock() - start) * 1e3

  summarize("q", q)
  summarize("k", k)
  summarize("v", v)
  summarize("o", o)
  summarize("lse", ctx.lse)
  print(("\n%s on %s, %s, scale %.4g, %.2f ms"):format(q.dtype, q.device, how.causal and "causal" or "not causal",
    how.scale or q:size(-1) ^ -0.5, milliseconds))
  local plan = cf.explain(q, k, v, { causal = how.causal, scale = how.scale, pass = "forward" })
  print(("kernel %s\ntile   %s"):format(plan.forward.kernel, plan.forward.tile))
  print(plan.forward.work and "work   " .. plan.forward.work or "grid   " .. plan.forward.grid)
  return o, ctx.lse
end

-- ---- The demonstration -------------------------------------------------------------------------------

local function temporary_directory()
  local process = io.popen "mktemp -d"
  local path = process:read "*l"
  process:close()
  return path or arguments.fail "cannot make a temporary directory"
end

-- Writes q, k and v as .npy files, attends from them, reads the result back and checks it against the reference.
local function demonstrate()
  local directory = temporary_directory()
  local function path(name) return ("%s/%s.npy"):format(directory, name) end
  local paths = { path "q", path "k", path "v" }
  cf.manual_seed(7)
  for i, shape in ipairs { { 2, 8, 200, 64 }, { 2, 2, 300, 64 }, { 2, 2, 300, 32 } } do
    loaded(cf.save(paths[i], cf.randn(shape)))
  end
  print(("attend_files.lua %s --out %s\n"):format(table.concat(paths, " "), path "o"))

  local q, k, v = read(paths)
  for _, input in ipairs(paths) do os.remove(input) end
  write(path "o", attend(q, k, v))
  local o = loaded(cf.load(path "o", { dtype = q.dtype }))
  os.remove(path "o")
  os.remove(directory)

  local exact = cf.reference.attention(q, k, v, { causal = options.causal, scale = options.scale })
  local _, report = cf.all_close(o, exact)
  print(("read it back: relative error %.1e against the float64 reference"):format(report.rel_norm))
  local bound = ({ float32 = 2e-6, float16 = 2e-3, bfloat16 = 2e-2 })[o.dtype]
  if not (report.rel_norm <= bound) then arguments.fail(("that is more than %.0e"):format(bound)) end
end

-- ---- Command line -----------------------------------------------------------------------------------

if #options == 0 then
  if options.out or options.lse then arguments.fail("--out and --lse need the files to read", 2) end
  return demonstrate()
end
for _, input in ipairs(options) do
  if input == options.out or input == options.lse then arguments.fail(input .. ": is read and cannot be written too", 2) end
end
local o, lse = attend(read(options))
if options.out or options.lse then print() end
if options.out then write(options.out, o, lse) end
if options.lse then
  loaded(cf.save(options.lse, lse))
  print(("wrote  %s"):format(options.lse))
end
