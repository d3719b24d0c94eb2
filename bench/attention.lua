-- Times attention: on the CPU against the machine's float32 peak, on a CUDA device by its events. Run by script/bench, whose
-- help lists the options.
--
-- A forward pass counts 4 B H S^2 D operations, half of that where causal; a backward pass 2.5 times as many. Inputs are
-- normal random numbers. On the CPU a rate is the best of --repeats runs, each of calls for 0.05 s or of one; what they have of
-- the peak is their median, each against multiply-adds between registers, on as many threads, right before and after it: clocks
-- depend on how many cores work, and neighbours come and go. On a CUDA device a rate is the median, each run after the L2
-- cache was flushed.

local ffi = require "ffi"
local cf = require "cuflash"

ffi.cdef [[
typedef struct { long seconds, nanoseconds; } bench_time;
int clock_gettime(int clock, bench_time *time);
double fma_peak(int threads, double seconds);
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
    threads = "1," .. cf.num_threads(), scaling = false, repeats = "5", json = false,
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

local function median_of(values)
  table.sort(values)
  return (values[math.ceil(#values / 2)] + values[math.floor(#values / 2) + 1]) / 2
end

local fma -- of this instruction set; loaded where the CPU is timed

local function peak()
  local BURST = 0.01
  local rate = fma.fma_peak(cf.num_threads(), BURST)
  return rate > 0 and rate or fail("no float32 peak: multiply-adds did not run on %d threads", cf.num_threads())
end

-- The best rate of `work` billion operations, what the runs have of the peak, and the peaks; medians.
local function beside_peak(repeats, work, call)
  local LEAST_SECONDS = 0.05
  local function seconds(calls)
    local start = now()
    for _ = 1, calls do call() end
    return now() - start
  end
  call()
  local calls = math.ceil(LEAST_SECONDS / seconds(1))
  local most, shares, peaks, before = 0, {}, {}, peak()
  for i = 1, repeats do
    call() -- wakes its threads
    local rate, after = work * calls / seconds(calls), peak()
    most = math.max(most, rate)
    shares[i], peaks[i] = 2 * rate / (before + after), (before + after) / 2
    before = after
  end
  return most, median_of(shares), median_of(peaks)
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
  return median_of(times)
end

-- A case's calls, and how many billion operations a forward is.
local function problem(case, device)
  local options = {dtype = case.dtype, device = device}
  local q = cf.randn({case.batch, case.heads, case.seq, case.dim}, options)
  local k = cf.randn({case.batch, case.kv_heads, case.seq, case.dim}, options)
  local v = cf.randn({case.batch, case.kv_heads, case.seq, case.dim}, options)
  local d_o = cf.randn({case.batch, case.heads, case.seq, case.dim}, options)
  local out = cf.empty({case.batch, case.heads, case.seq, case.dim}, options)
  local gradients = {dq = cf.empty_like(q), dk = cf.empty_like(k), dv = cf.empty_like(v)}
  local context
  local function forward()
    local _
    _, context = cf.attention(q, k, v, {causal = case.causal, out = out})
  end
  local function backward() context:backward(d_o, gradients) end
  return forward, backward, 4 * case.batch * case.heads * case.seq ^ 2 * case.dim * (case.causal and 0.5 or 1) / 1e9
end

local function measure(case, device)
  local forward, backward, work = problem(case, device)
  if device == "cpu" then
    local peak_forward, peak_backward
    case.forward, case.forward_of_peak, peak_forward = beside_peak(case.repeats, work, forward)
    case.backward, case.backward_of_peak, peak_backward = beside_peak(case.repeats, 2.5 * work, backward)
    case.peak = (peak_forward + peak_backward) / 2
  else
    case.forward = work / median(case.repeats, forward)
    case.backward = 2.5 * work / median(case.repeats, backward)
  end
end

local OWN = {avx512bf16 = {bfloat16 = true}, amx = {bfloat16 = true, float16 = true}} -- instructions for a dtype

local function cpu_name()
  local file = io.open "/proc/cpuinfo"
  local text = file and file:read "*a" or ""
  if file then file:close() end
  return text:match "model name%s*:%s*([^\n]+)" or "unknown CPU"
end

local function to_json(results)
  local json = require "dkjson"
  return json.encode(results, {indent = true,
    keyorder = {"cpu", "device", "isa", "version", "rows", "scaling", "threads", "pass", "dtype", "dim"}})
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
local scaling, scaled -- to so many threads
if on_cpu and options.scaling then
  scaling, scaled = dofile((arg[0]:match "^(.*/)" or "") .. "scaling.lua"), numbers(options, "scaling")[1]
  if scaled > scaling.cores() then
    fail("--scaling: expected 1 to %d, the cores there are, got %d", scaling.cores(), scaled)
  end
end
if options.json then
  local file, reason = io.open(options.json, "a")
  if not file then fail("--json: %s", reason) end
  file:close()
end

-- ---- Rows ---------------------------------------------------------------------------------------------------

local batch = numbers(options, "batch")[1]

-- Calls f with every case of these threads.
local function each_case(threads, f)
  for _, dtype in ipairs(list(options.dtype)) do
    for _, dim in ipairs(numbers(options, "dim")) do
      for _, seq in ipairs(numbers(options, "seq")) do
        for _, causal in ipairs {false, true} do
          f {
            threads = threads, dtype = dtype, dim = dim, seq = seq, causal = causal, heads = heads, kv_heads = kv_heads,
            batch = batch, repeats = repeats,
          }
        end
      end
    end
  end
end

-- ---- Scaling ------------------------------------------------------------------------------------------------

-- Rates of calls in so many seconds, or of one.
local function rate_of(work, call)
  return function(seconds)
    call()
    local start, calls = now(), 0
    repeat
      call()
      calls = calls + 1
    until now() - start >= seconds
    return work * calls / (now() - start)
  end
end

local function print_scaling(row)
  local what = row.dtype and ("%-8s %4d %6d %6d  %-6s %-9s"):format(row.dtype, row.dim, row.seq, row.heads,
    row.causal and "yes" or "no", row.pass) or ("%-45s"):format "multiply-adds between registers"
  print(("%s %9.1f %9.1f %9.1f %8.0f%%"):format(what, row.alone, row.processes, row.together, 100 * row.together / row.alone))
end

-- Rows of what `count` threads have of as many cores, each of them alone.
local function measure_scaling(count)
  local rows = {}
  local function add(sums, row)
    for key, value in pairs(sums) do row[key] = value end
    row.threads, row.repeats = count, repeats
    rows[#rows + 1] = row
    print_scaling(row)
  end
  print(("\nscaling to %d thread%s"):format(count, count == 1 and "" or "s"))
  print(("%61s %9s %9s %9s"):format("alone", "processes", "threads", "of alone"))
  add(scaling.measure(count, repeats, function(threads)
    return {function(seconds) return fma.fma_peak(threads, seconds) end}
  end)[1], {})
  local groups = heads / kv_heads
  each_case(count, function(case)
    local sums = scaling.measure(count, repeats, function(threads)
      cf.num_threads(threads)
      local share = setmetatable({}, {__index = case})
      if threads < count then
        share.kv_heads = math.ceil(kv_heads / count)
        share.heads = groups * share.kv_heads
      end
      local forward, backward, work = problem(share, "cpu")
      forward() -- what backward needs
      return {rate_of(work, forward), rate_of(2.5 * work, backward)}
    end)
    for i, pass in ipairs {"forward", "backward"} do
      add(sums[i], {
        pass = pass, dtype = case.dtype, dim = case.dim, seq = case.seq, causal = case.causal, heads = heads,
        kv_heads = kv_heads, batch = batch,
      })
    end
  end)
  print(([[

alone: a core's while the others have nothing to do, those of all %d added up; processes: of one thread each, at the same time;
threads: of one process. The heads are shared out to the processes.]]):format(count))
  return rows
end

-- ---- Runs ---------------------------------------------------------------------------------------------------

local function print_headings()
  print "dtype     dim    seq  heads  causal   forward  of peak  backward  of peak      peak"
end

local function print_row(case)
  print(("%-8s %4d %6d %6d  %-6s %8.1f %7.0f%% %9.1f %7.0f%% %9.1f"):format(case.dtype, case.dim, case.seq, heads,
    case.causal and "yes" or "no", case.forward, 100 * case.forward_of_peak, case.backward, 100 * case.backward_of_peak,
    case.peak))
end

local function measure_cpu()
  local results = {cpu = cpu_name(), isa = cf.cpu.isa(), version = cf.version, rows = {}}
  local overtaken = false
  fma = ffi.load(("%s/libfma_peak_%s.so"):format(folder, cf.cpu.isa()))
  for _, threads in ipairs(numbers(options, "threads")) do cf.num_threads(threads) end -- an error before all, if there is one
  print(("%s, %s"):format(results.cpu, results.isa))
  for _, threads in ipairs(numbers(options, "threads")) do
    cf.num_threads(threads)
    print(("\n%d thread%s"):format(threads, threads == 1 and "" or "s"))
    print_headings()
    each_case(threads, function(case)
      measure(case, "cpu")
      local own = (OWN[cf.cpu.isa()] or {})[case.dtype] -- which are not held to that peak
      overtaken = overtaken or not own and math.max(case.forward_of_peak, case.backward_of_peak) > 1
      results.rows[#results.rows + 1] = case
      print_row(case)
    end)
  end
  print "\nGFLOP/s, of 4 B H S^2 D operations a forward pass, half where causal, 2.5 times that backward; the best of the runs."
  print "peak: float32 multiply-adds between registers, on as many threads, before and after each run; of peak: medians of runs."
  if overtaken then print "More than the peak: the machine was busy; run it again for figures to keep." end
  if scaled then results.scaling = measure_scaling(scaled) end
  return results
end

local function measure_cuda()
  local results = {device = cf.cuda.device_info(options.device), version = cf.version, rows = {}}
  flush = cf.empty({64 * 2 ^ 20}, {device = options.device})
  print(("%s, sm_%d, driver for CUDA %s, kernels by CUDA %s\n"):format(results.device.name, results.device.compute,
    results.device.driver, results.device.toolkit))
  print("dtype     dim    seq  heads  causal   forward  backward")
  each_case(nil, function(case)
    measure(case, options.device)
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
