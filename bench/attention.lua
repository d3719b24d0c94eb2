-- Times attention on the CPU against the machine's float32 peak. Run by script/bench, whose help lists the options.
--
-- A forward pass counts 4 B H S^2 D operations, half of that where causal; a backward pass 2.5 times as many. Inputs are
-- normal random numbers; each figure is the best of --repeats runs after one to warm up.

local ffi = require "ffi"
local cf = require "cuflash"

ffi.cdef [[
typedef struct { long seconds, nanoseconds; } bench_time;
int clock_gettime(int clock, bench_time *time);
]]

local MONOTONIC = 1
local time = ffi.new "bench_time"

local function now()
  ffi.C.clock_gettime(MONOTONIC, time)
  return tonumber(time.seconds) + tonumber(time.nanoseconds) * 1e-9
end

local function fail(...)
  io.stderr:write("bench: ", string.format(...), "\n")
  os.exit(2)
end

local defaults = {
  dim = "64,128", seq = "2048", heads = "2", ["kv-heads"] = false, batch = "1", dtype = "float32",
  threads = "1," .. cf.num_threads(), repeats = "5", json = false,
}

local function parse(arguments)
  local options = {}
  for key, value in pairs(defaults) do options[key] = value end
  local i = 1
  while i <= #arguments do
    local key = arguments[i]:match "^%-%-(.+)"
    if not key or options[key] == nil then fail("unknown argument '%s' (see --help)", arguments[i]) end
    if not arguments[i + 1] then fail("argument '%s' needs a value", arguments[i]) end
    options[key] = arguments[i + 1]
    i = i + 2
  end
  return options
end

local function list(text) -- the items of "a,b", without repetition
  local items, seen = {}, {}
  for item in text:gmatch "[^,]+" do
    if not seen[item] then items[#items + 1] = item end
    seen[item] = true
  end
  return items
end

local function numbers(options, key)
  local items = list(options[key])
  for i, item in ipairs(items) do
    items[i] = tonumber(item)
    if not items[i] or items[i] < 1 or items[i] % 1 ~= 0 then
      fail("--%s: expected positive whole numbers, got '%s'", key, item)
    end
  end
  return items
end

local function best(repeats, run)
  run()
  local least = math.huge
  for _ = 1, repeats do
    local start = now()
    run()
    least = math.min(least, now() - start)
  end
  return least
end

local function measure(case)
  local options = {dtype = case.dtype}
  local q = cf.randn({case.batch, case.heads, case.seq, case.dim}, options)
  local k = cf.randn({case.batch, case.kv_heads, case.seq, case.dim}, options)
  local v = cf.randn({case.batch, case.kv_heads, case.seq, case.dim}, options)
  local d_o = cf.randn({case.batch, case.heads, case.seq, case.dim}, options)
  local out = cf.empty({case.batch, case.heads, case.seq, case.dim}, options)
  local work = 4 * case.batch * case.heads * case.seq ^ 2 * case.dim * (case.causal and 0.5 or 1) / 1e9
  local context
  local forward = best(case.repeats, function()
    local _
    _, context = cf.attention(q, k, v, {causal = case.causal, out = out})
  end)
  local gradients = {dq = cf.empty_like(q), dk = cf.empty_like(k), dv = cf.empty_like(v)}
  local backward = best(case.repeats, function() context:backward(d_o, gradients) end)
  case.forward, case.backward = work / forward, 2.5 * work / backward
end

local function peak(folder, threads)
  local pipe = assert(io.popen(("'%s/fma_peak_%s' %d"):format(folder, cf.cpu.isa(), threads)))
  local rate = tonumber(pipe:read "*l")
  pipe:close()
  return rate or fail("%s/fma_peak_%s did not run", folder, cf.cpu.isa())
end

local function cpu_name()
  local file = io.open "/proc/cpuinfo"
  local text = file and file:read "*a" or ""
  if file then file:close() end
  return text:match "model name%s*:%s*([^\n]+)" or "unknown CPU"
end

local function to_json(results)
  local json = require "dkjson"
  return json.encode(results, {indent = true, keyorder = {"cpu", "isa", "version", "peaks", "rows", "threads", "dtype", "dim"}})
end

local folder = table.remove(arg, 1)
local options = parse(arg)
local heads = numbers(options, "heads")[1]
local kv_heads = options["kv-heads"] and numbers(options, "kv-heads")[1] or heads
if heads % kv_heads ~= 0 then fail("--kv-heads: expected a divisor of the %d heads, got %d", heads, kv_heads) end
for _, dim in ipairs(numbers(options, "dim")) do
  if dim > 512 then fail("--dim: expected 1 to 512, got %d", dim) end
end
for _, dtype in ipairs(list(options.dtype)) do
  local ok, message = pcall(cf.empty, {1}, {dtype = dtype})
  if not ok then fail("--dtype: %s", message:match "expected.*" or message) end
  if cf.empty({1}, {dtype = dtype}).dtype == "float64" then fail("--dtype: no attention kernel takes float64") end
end
if options.json then
  local file, message = io.open(options.json, "a")
  if not file then fail("--json: %s", message) end
  file:close()
end
local results = {cpu = cpu_name(), isa = cf.cpu.isa(), version = cf.version, peaks = {}, rows = {}}

local overtaken = false
print(("%s, %s"):format(results.cpu, results.isa))
for _, threads in ipairs(numbers(options, "threads")) do
  cf.num_threads(threads)
  local limit = peak(folder, threads)
  results.peaks[#results.peaks + 1] = {threads = threads, gflops = limit}
  print(("\n%d thread%s: measured float32 FMA peak %.1f GFLOP/s"):format(threads, threads == 1 and "" or "s", limit))
  print("dtype     dim    seq  heads  causal   forward  of peak  backward  of peak")
  for _, dtype in ipairs(list(options.dtype)) do
    for _, dim in ipairs(numbers(options, "dim")) do
      for _, seq in ipairs(numbers(options, "seq")) do
        for _, causal in ipairs {false, true} do
          local case = {
            threads = threads, dtype = dtype, dim = dim, seq = seq, causal = causal, heads = heads,
            kv_heads = kv_heads, batch = numbers(options, "batch")[1], repeats = numbers(options, "repeats")[1],
          }
          measure(case)
          overtaken = overtaken or math.max(case.forward, case.backward) > limit
          results.rows[#results.rows + 1] = case
          print(("%-8s %4d %6d %6d  %-6s %8.1f %7.0f%% %9.1f %7.0f%%"):format(dtype, dim, seq, heads, causal and "yes" or "no",
            case.forward, 100 * case.forward / limit, case.backward, 100 * case.backward / limit))
        end
      end
    end
  end
end
print "\nforward and backward in GFLOP/s: 4 B H S^2 D operations a forward pass, half where causal, 2.5 times that backward"
if overtaken then
  print "a rate above the peak: the machine was busy while the peak was measured; run it again for figures to keep"
end

if options.json then
  local file, message = io.open(options.json, "w")
  if not file then fail("%s", message) end
  file:write(to_json(results), "\n")
  file:close()
  print("written to " .. options.json)
end
