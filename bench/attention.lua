-- Times attention: on the CPU against the machine's float32 peak, on a CUDA device by its events. Run by script/bench, whose
-- help lists the options.
--
-- A forward pass counts 4 B H S^2 D operations, half of that where causal; a backward pass 2.5 times as many. Inputs are
-- normal random numbers. On the CPU each figure is the best of --repeats runs after one to warm up; on a CUDA device their
-- median, each after the L2 cache was flushed.

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
  cpu = {
    device = "cpu", dim = "64,128", seq = "2048", heads = "2", ["kv-heads"] = false, batch = "1", dtype = "float32",
    threads = "1," .. cf.num_threads(), processes = false, repeats = "5", json = false,
  },
  cuda = {
    device = "cuda", dim = "64,128", seq = "1024,4096,16384", heads = "16", ["kv-heads"] = false, batch = "1",
    dtype = "bfloat16", repeats = "20", json = false,
  },
}

local function parse(arguments)
  local given = {}
  for i = 1, #arguments, 2 do
    local key = arguments[i]:match "^%-%-(.+)"
    if not key or defaults.cpu[key] == nil then fail("unknown argument '%s' (see --help)", arguments[i]) end
    if not arguments[i + 1] then fail("argument '%s' needs a value", arguments[i]) end
    given[key] = arguments[i + 1]
  end
  local kind = (given.device or "cpu"):match "^cpu$" or "cuda"
  for key in pairs(given) do
    if defaults[kind][key] == nil then fail("--%s is for the CPU alone", key) end
  end
  return setmetatable(given, {__index = defaults[kind]})
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

-- ---- Timing -------------------------------------------------------------------------------------------------

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

local flush -- larger than any L2 cache; made where a CUDA device is timed

local function median(repeats, run)
  run()
  local events, times = {}, {}
  for i = 1, repeats do
    flush:fill_(i)
    local start = cf.cuda.event(flush.device):record()
    run()
    events[i] = {start, cf.cuda.event(flush.device):record()}
  end
  for i, pair in ipairs(events) do times[i] = pair[1]:elapsed(pair[2]) * 1e-3 end
  table.sort(times)
  return (times[math.ceil(repeats / 2)] + times[math.floor(repeats / 2) + 1]) / 2
end

local function measure(case, device)
  local options = {dtype = case.dtype, device = device}
  local q = cf.randn({case.batch, case.heads, case.seq, case.dim}, options)
  local k = cf.randn({case.batch, case.kv_heads, case.seq, case.dim}, options)
  local v = cf.randn({case.batch, case.kv_heads, case.seq, case.dim}, options)
  local d_o = cf.randn({case.batch, case.heads, case.seq, case.dim}, options)
  local out = cf.empty({case.batch, case.heads, case.seq, case.dim}, options)
  local work = 4 * case.batch * case.heads * case.seq ^ 2 * case.dim * (case.causal and 0.5 or 1) / 1e9
  local time_of = device == "cpu" and best or median
  local context
  local forward = time_of(case.repeats, function()
    local _
    _, context = cf.attention(q, k, v, {causal = case.causal, out = out})
  end)
  local gradients = {dq = cf.empty_like(q), dk = cf.empty_like(k), dv = cf.empty_like(v)}
  local backward = time_of(case.repeats, function() context:backward(d_o, gradients) end)
  case.forward, case.backward = work / forward, 2.5 * work / backward
end

local HAVE_BFLOAT16 = {avx512bf16 = true, amx = true}

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
  return json.encode(results, {indent = true,
    keyorder = {"cpu", "device", "isa", "version", "peaks", "rows", "processes", "threads", "dtype", "dim"}})
end

-- ---- Options ------------------------------------------------------------------------------------------------

local folder = table.remove(arg, 1)
local options = parse(arg)
local on_cpu = options.device == "cpu"
local heads = numbers(options, "heads")[1]
local kv_heads = options["kv-heads"] and numbers(options, "kv-heads")[1] or heads
local repeats = numbers(options, "repeats")[1]
local largest = on_cpu and 512 or 256
if heads % kv_heads ~= 0 then fail("--kv-heads: expected a divisor of the %d heads, got %d", heads, kv_heads) end
for _, dim in ipairs(numbers(options, "dim")) do
  if dim > largest then fail("--dim: expected 1 to %d, got %d", largest, dim) end
end
local ok, message = pcall(cf.empty, {1}, {device = options.device})
if not ok then fail("--device: %s", message:gsub("^[^:]*:%d+: empty: ", "")) end
for _, dtype in ipairs(list(options.dtype)) do
  ok, message = pcall(cf.empty, {1}, {dtype = dtype})
  if not ok then fail("--dtype: %s", message:match "expected.*" or message) end
  if cf.empty({1}, {dtype = dtype}).dtype == "float64" then fail("--dtype: no attention kernel takes float64") end
end
if options.json then
  local file, reason = io.open(options.json, "a")
  if not file then fail("--json: %s", reason) end
  file:close()
end

-- ---- Rows ---------------------------------------------------------------------------------------------------

local batch = numbers(options, "batch")[1]
local processes = options.processes and numbers(options, "processes")[1]

local function each_problem(f)
  for _, dtype in ipairs(list(options.dtype)) do
    for _, dim in ipairs(numbers(options, "dim")) do
      for _, seq in ipairs(numbers(options, "seq")) do f(dtype, dim, seq) end
    end
  end
end

-- Calls f with every case of these threads, measured.
local function each_case(threads, f)
  each_problem(function(dtype, dim, seq)
    for _, causal in ipairs {false, true} do
      local case = {
        threads = threads, dtype = dtype, dim = dim, seq = seq, causal = causal, heads = heads, kv_heads = kv_heads,
        batch = batch, repeats = repeats,
      }
      measure(case, options.device)
      f(case)
    end
  end)
end

local function quote(text)
  return "'" .. text:gsub("'", "'\\''") .. "'"
end

-- What so many processes of one thread each measure of a problem at the same time: causal or not, and the peak, added up.
local function measure_processes(count, dtype, dim, seq)
  local json = require "dkjson"
  local interpreter = -1
  while arg[interpreter - 1] do interpreter = interpreter - 1 end
  local command = ("%s %s %s --threads 1 --dtype %s --dim %d --seq %d --heads %d --kv-heads %d --batch %d --repeats %d"):format(
    quote(arg[interpreter]), quote(arg[0]), quote(folder), dtype, dim, seq, heads, kv_heads, batch, repeats)
  local files, pipes, sum = {}, {}, nil
  for i = 1, count do
    files[i] = os.tmpname()
    pipes[i] = assert(io.popen(command .. " --json " .. quote(files[i]) .. " 2>&1"))
  end
  for i = 1, count do
    local output = pipes[i]:read "*a"
    pipes[i]:close()
    local file = assert(io.open(files[i]))
    local one = json.decode(file:read "*a")
    file:close()
    os.remove(files[i])
    if not one then fail("process %d of %d: %s", i, count, output) end
    if sum then
      for j, row in ipairs(one.rows) do
        local all = sum.rows[j]
        all.forward, all.backward = all.forward + row.forward, all.backward + row.backward
      end
      sum.peaks[1].gflops = sum.peaks[1].gflops + one.peaks[1].gflops
    else
      sum = one
    end
  end
  return sum
end

local HEADINGS = "dtype     dim    seq  heads  causal   forward  of peak  backward  of peak"

local function print_row(case, limit)
  print(("%-8s %4d %6d %6d  %-6s %8.1f %7.0f%% %9.1f %7.0f%%"):format(case.dtype, case.dim, case.seq, heads,
    case.causal and "yes" or "no", case.forward, 100 * case.forward / limit, case.backward, 100 * case.backward / limit))
end

local function measure_cpu()
  local results = {cpu = cpu_name(), isa = cf.cpu.isa(), version = cf.version, peaks = {}, rows = {}}
  local overtaken = false
  print(("%s, %s"):format(results.cpu, results.isa))
  for _, threads in ipairs(numbers(options, "threads")) do
    cf.num_threads(threads)
    local limit = peak(folder, threads)
    results.peaks[#results.peaks + 1] = {threads = threads, gflops = limit}
    print(("\n%d thread%s: measured float32 FMA peak %.1f GFLOP/s"):format(threads, threads == 1 and "" or "s", limit))
    print(HEADINGS)
    each_case(threads, function(case)
      local own = case.dtype == "bfloat16" and HAVE_BFLOAT16[cf.cpu.isa()] -- instructions, which are not held to that peak
      overtaken = overtaken or not own and math.max(case.forward, case.backward) > limit
      results.rows[#results.rows + 1] = case
      print_row(case, limit)
    end)
  end
  if processes then
    print(("\n%d process%s of one thread at the same time, added up, and of what multiply-adds have so"):format(processes,
      processes == 1 and "" or "es"))
    print(HEADINGS)
    each_problem(function(dtype, dim, seq)
      local sum = measure_processes(processes, dtype, dim, seq)
      sum.peaks[1].processes = processes
      results.peaks[#results.peaks + 1] = sum.peaks[1]
      for _, case in ipairs(sum.rows) do
        case.processes = processes
        results.rows[#results.rows + 1] = case
        print_row(case, sum.peaks[1].gflops)
      end
    end)
  end
  print "\nforward and backward in GFLOP/s: 4 B H S^2 D operations a forward pass, half where causal, 2.5 times that backward"
  if overtaken then
    print "a rate above the peak: the machine was busy while the peak was measured; run it again for figures to keep"
  end
  return results
end

local function measure_cuda()
  local results = {device = cf.cuda.device_info(options.device), version = cf.version, rows = {}}
  flush = cf.empty({64 * 2 ^ 20}, {device = options.device})
  print(("%s, sm_%d, driver for CUDA %s, kernels by CUDA %s\n"):format(results.device.name, results.device.compute,
    results.device.driver, results.device.toolkit))
  print("dtype     dim    seq  heads  causal   forward  backward")
  each_case(nil, function(case)
    results.rows[#results.rows + 1] = case
    print(("%-8s %4d %6d %6d  %-6s %9.1f %9.1f"):format(case.dtype, case.dim, case.seq, heads, case.causal and "yes" or "no",
      case.forward / 1e3, case.backward / 1e3))
    collectgarbage()
    collectgarbage()
  end)
  print "\nforward and backward in TFLOP/s: 4 B H S^2 D operations a forward pass, half where causal, 2.5 times that backward"
  return results
end

io.stdout:setvbuf "line"
local done, results = pcall(on_cpu and measure_cpu or measure_cuda)
if not done then -- what cuflash refuses, and Ctrl-C
  local reason = tostring(results):gsub("^[^\n]-:%d+: ", "")
  if reason:find "interrupted" then
    io.stderr:write "\nbench: interrupted\n"
    os.exit(130)
  end
  fail("%s", reason)
end
if options.json then
  local file, reason = io.open(options.json, "w")
  if not file then fail("%s", reason) end
  file:write(to_json(results), "\n") -- rates in GFLOP/s
  file:close()
  print("written to " .. options.json)
end
