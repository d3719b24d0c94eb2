-- Runs the tests that came with a bundle (script/bundle), as ctest does in the repository. Usage:
--
--   ./test [--device cuda] [--only PATTERN] [--list] [-- BUSTED'S ARGUMENTS]
--
--   --device    where tensors live in the specs that follow it, and in the examples: cpu (else) or cuda
--   --only      only tests whose name holds this Lua pattern: --only spec.attention, --only '^c%.'
--   --list      their names alone
--
-- The last line counts what passed, failed and was skipped. Nothing is needed but a shell.

local bundle = table.remove(arg, 1)
local tree = bundle .. "/cuflash"
local SKIPPED = 77

local function fail(...)
  io.stderr:write("test: ", string.format(...), "\n")
  os.exit(2)
end

local function help()
  for line in io.lines(tree .. "/spec/support/bundle_test.lua") do
    local text = line:match "^%-%- ?(.*)"
    if not text then return end
    print(text)
  end
end

local device, pattern, list, rest = "cpu", "", false, {}
local i = 1
while arg[i] do
  local name = arg[i]
  if name == "-h" or name == "--help" then
    help()
    return
  elseif name == "--list" then
    list = true
  elseif name == "--device" or name == "--only" then
    i = i + 1
    local value = arg[i] or fail("argument '%s' needs a value", name)
    if name == "--device" then device = value else pattern = value end
  elseif name == "--" then
    for k = i + 1, #arg do rest[#rest + 1] = arg[k] end
    break
  else
    fail("unknown argument '%s' (see --help; tests are chosen with --only, and busted's own arguments follow --)", name)
  end
  i = i + 1
end

local function quote(text)
  return "'" .. text:gsub("'", "'\\''") .. "'"
end

-- ---- Running ------------------------------------------------------------------------------------------------

local function run(command)
  local pipe = assert(io.popen("{ " .. command .. "\n} 2>&1; echo \"status:$?\""))
  local ok, output = pcall(pipe.read, pipe, "*a")
  if not ok then -- Ctrl-C
    io.stderr:write("\ntest: interrupted\n")
    os.exit(130)
  end
  pipe:close()
  local text, status = output:match "^(.*)status:(%d+)\n$"
  return text or output, tonumber(status) or 1
end

local function environment(test)
  local words = {"CUFLASH_SPEC_DEVICE=" .. device, "CUFLASH_BUNDLE=" .. bundle}
  for _, word in ipairs(test.environment) do words[#words + 1] = word end
  for k, word in ipairs(words) do
    local name, value = word:match "^([^=]*)=(.*)$"
    words[k] = ("export %s=%s; "):format(name, quote(value))
  end
  return table.concat(words)
end

-- Instruction sets that this CPU does not run.
local runs = {}
local function can_run(isa)
  if runs[isa] == nil then
    runs[isa] = run(("CUFLASH_CPU_ISA=%s luajit -e 'io.write(require(\"cuflash\").cpu.isa())'"):format(quote(isa))) == isa
  end
  return runs[isa]
end

-- An example that takes --device, as those in Lua and Python do.
local function takes_device(test)
  return test.name:find "^example%." and test.command[#test.command]:find "%.%a+$"
end

local function command(test)
  local words = {}
  for k, word in ipairs(test.command) do words[k] = quote(word) end
  if device ~= "cpu" and takes_device(test) then words[#words + 1] = "--device " .. quote(device) end
  local text = table.concat(words, " ")
  if test.kind == "spec" then
    for _, word in ipairs(rest) do text = quote(word) .. " " .. text end
    local tags = device ~= "cpu" and " --exclude-tags=cpu" or "" -- what only holds where the CPU computes
    text = ("cd %s; luajit -lcuflash %s -o TAP%s %s"):format(quote(tree), quote(bundle .. "/bin/busted"), tags, text)
  end
  return environment(test) .. text
end

local function isa_of(test)
  for _, word in ipairs(test.environment) do
    local isa = word:match "^CUFLASH_CPU_ISA=(%w+)$"
    if isa then return isa end
  end
end

-- Gives "passed", "failed" or "skipped", and what to say of it.
local function judge(test)
  local isa = isa_of(test)
  if isa and test.kind == "spec" and not can_run(isa) then return "skipped", "this CPU does not run " .. isa, 0, 0 end
  local output, status = run(command(test))
  local good, bad = 0, 0
  if test.kind == "spec" then
    for line in output:gmatch "[^\n]+" do
      if line:find "^ok %d" then good = good + 1 elseif line:find "^not ok %d" then bad = bad + 1 end
    end
    if status == 0 and not ("\n" .. output):find "\n1%.%.%d+" then status = 1 end -- it ended without having counted its tests
  end
  if status == SKIPPED then return "skipped", output:match "skipped: ([^\n]*)" or "", 0, 0 end
  if status ~= 0 and output:find "needs PyTorch" then return "skipped", "it " .. output:match "needs PyTorch[^\n]*", 0, 0 end
  if status ~= 0 then return "failed", output, good, bad end
  return "passed", "", good, bad
end

-- ---- All of them --------------------------------------------------------------------------------------------

local tests = {}
for _, test in ipairs(dofile(tree .. "/build/release/tests.lua")) do
  for _, words in ipairs {test.command, test.environment} do
    for k, word in ipairs(words) do words[k] = word:gsub("@tree@", (tree:gsub("%%", "%%%%"))) end
  end
  local several = device ~= "cpu" and isa_of(test) -- once is enough where the CPU does not compute
  local chosen = test.name:find(pattern)
  if several and test.kind == "spec" then
    chosen = chosen and test.name:find "%.baseline$"
    test.name = test.name:gsub("%.baseline$", "")
    test.environment = {}
  elseif several then
    chosen = nil
  end
  if chosen then tests[#tests + 1] = test end
end
if #tests == 0 then fail("no test has a name with '%s' in it (--list tells the names)", pattern) end
if list then
  for _, test in ipairs(tests) do print(test.name) end
  return
end
if device ~= "cpu" then
  local output, status = run(("luajit -e 'require(\"cuflash\").empty({1}, {device = %q})'"):format(device))
  if status ~= 0 then fail("%s", output:gsub("\nstack traceback.*", ""):gsub("\n$", "")) end
end

local counts, specs, broken = {passed = 0, failed = 0, skipped = 0}, 0, 0
for k, test in ipairs(tests) do
  local outcome, text, good, bad = judge(test)
  counts[outcome] = counts[outcome] + 1
  specs, broken = specs + good + bad, broken + bad
  print(("%3d/%d %-40s %s%s"):format(k, #tests, test.name, outcome, outcome == "skipped" and ": " .. text or ""))
  if outcome == "failed" then io.write(text:gsub("[^\n]+", "    %0"), text:find "\n$" and "" or "\n") end
  io.stdout:flush()
end
print(("%d busted specs ran within these tests, %d of them failed"):format(specs, broken))
print(("tests on %s: %d passed, %d failed, %d skipped"):format(device, counts.passed, counts.failed, counts.skipped))
os.exit(counts.failed == 0 and 0 or 1)
