-- What threads make of their cores, for script/bench --scaling. The same work is done in three ways, in turn, over and over, as
-- clocks change and neighbours come and go: by processes of one thread, each on a core of its own, one after the other; by these
-- processes at the same time, which is what the machine has; and by one process of as many threads on the same cores.

local ffi = require "ffi"

ffi.cdef [[
typedef struct { int what; double seconds; } bench_order; /* what: counts from 1 */
typedef struct { unsigned char cores[128]; } bench_cores;
int pipe(int ends[2]);
int fork(void);
void _exit(int status);
int close(int file);
long read(int file, void *to, size_t size);
long write(int file, const void *from, size_t size);
int waitpid(int process, int *status, int options);
int sched_getaffinity(int process, size_t size, bench_cores *cores);
int sched_setaffinity(int process, size_t size, const bench_cores *cores);
]]

local C, bit = ffi.C, require "bit"
local SECONDS = 0.25 -- each way, each time

-- The cores this process may be on, and a set of some of them.
local function cores_allowed()
  local set, cores = ffi.new "bench_cores", {}
  assert(C.sched_getaffinity(0, ffi.sizeof(set), set) >= 0, "sched_getaffinity failed")
  for core = 0, 8 * ffi.sizeof(set) - 1 do
    if bit.band(set.cores[bit.rshift(core, 3)], bit.lshift(1, core % 8)) ~= 0 then cores[#cores + 1] = core end
  end
  return cores
end

local function stay_on(cores)
  local set = ffi.new "bench_cores"
  for _, core in ipairs(cores) do
    local byte = bit.rshift(core, 3)
    set.cores[byte] = bit.bor(set.cores[byte], bit.lshift(1, core % 8))
  end
  assert(C.sched_setaffinity(0, ffi.sizeof(set), set) == 0, "sched_setaffinity failed")
end

local function open_pipe()
  local ends = ffi.new "int[2]"
  assert(C.pipe(ends) == 0, "pipe failed")
  return {reads = ends[0], writes = ends[1]}
end

local function send_rate(answers, rate)
  local answer = ffi.new("double[1]", rate)
  C.write(answers.writes, answer, ffi.sizeof(answer))
end

-- A child answers orders with rates until there are no more; with -1 where it has failed.
local function serve(child, core, make, orders, answers)
  local ok, message = pcall(function()
    stay_on {core}
    local items, order = make(1), ffi.new "bench_order"
    while C.read(orders.reads, order, ffi.sizeof(order)) == ffi.sizeof(order) do
      send_rate(answers, items[order.what](order.seconds))
    end
  end)
  if not ok then
    if not tostring(message):find "interrupted" then io.stderr:write(("bench: process %d: %s\n"):format(child, message)) end
    send_rate(answers, -1)
  end
  C._exit(ok and 0 or 1)
end

local function start_children(cores, make)
  local children, answers = {}, open_pipe()
  for i, core in ipairs(cores) do
    local orders = open_pipe()
    local process = C.fork()
    assert(process >= 0, "fork failed")
    if process == 0 then
      C.close(orders.writes) -- and those of others: it ends when the parent does
      for _, other in ipairs(children) do C.close(other.orders.writes) end
      serve(i, core, make, orders, answers)
    end
    C.close(orders.reads)
    children[i] = {process = process, orders = orders}
  end
  C.close(answers.writes)
  return children, answers
end

local function stop_children(children, answers)
  for _, child in ipairs(children) do C.close(child.orders.writes) end
  for _, child in ipairs(children) do C.waitpid(child.process, nil, 0) end
  C.close(answers.reads)
end

local function send_order(child, what, seconds)
  local order = ffi.new("bench_order", what, seconds)
  assert(C.write(child.orders.writes, order, ffi.sizeof(order)) == ffi.sizeof(order), "a process has ended")
end

local function take_rate(answers)
  local answer = ffi.new "double[1]"
  assert(C.read(answers.reads, answer, ffi.sizeof(answer)) == ffi.sizeof(answer), "the processes have ended")
  assert(answer[0] >= 0, "a process failed")
  return answer[0]
end

-- make(threads) makes functions that take seconds and return a rate: of a share of the work, where threads is 1. Returns for each
-- of them the means of so many rounds: `alone`, of all cores added up, `processes`, and `together`.
local function measure(threads, rounds, make)
  local before, cores = cores_allowed(), {}
  for i = 1, threads do cores[i] = before[i] end
  local children, answers = start_children(cores, make)
  local ok, results = pcall(function()
    stay_on(cores)
    local sums = {}
    for what, rate in ipairs(make(threads)) do
      local sum = {alone = 0, processes = 0, together = 0}
      for _ = 1, rounds do
        for _, child in ipairs(children) do
          send_order(child, what, SECONDS / threads)
          sum.alone = sum.alone + take_rate(answers) / rounds
        end
        for _, child in ipairs(children) do send_order(child, what, SECONDS) end
        for _ = 1, threads do sum.processes = sum.processes + take_rate(answers) / rounds end
        sum.together = sum.together + rate(SECONDS) / rounds
      end
      sums[what] = sum
    end
    return sums
  end)
  stop_children(children, answers)
  stay_on(before)
  if not ok then error(results, 0) end
  return results
end

return {measure = measure, cores = function() return #cores_allowed() end}
