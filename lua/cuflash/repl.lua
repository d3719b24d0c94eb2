--- The REPL: values are printed, chunks may span lines, `? name` explains, Ctrl-C returns to the prompt.
-- @module cuflash.repl

local cf = require "cuflash"
local complete = require "cuflash.complete"
local console = require "cuflash.console"
local help = require "cuflash.help"

local repl = {}

local USAGE = [=[
usage: script/repl [options] [script [arguments]]
  -e CODE    runs CODE
  -l NAME    requires NAME
  -i         goes interactive after running CODE or a script
  -v         prints the versions
  -          runs standard input as a script
Without arguments it reads from the terminal, or evaluates standard input line by line.]=]

local MOST_MEMBERS = 40

-- ---- Values ------------------------------------------------------------------------------------------

local function brief(value)
  if type(value) == "string" then return ("%q"):format(value):gsub("\\\n", "\\n") end
  if cf.is_tensor(value) then return tostring(value):match("%b[]$") end
  return tostring(value)
end

local function table_text(value)
  local parts, counted = {}, 0
  for i, member in ipairs(value) do
    if i > MOST_MEMBERS then break end
    counted = i
    parts[i] = (brief(member))
  end
  local keys = {}
  for key in pairs(value) do
    local listed = type(key) == "number" and key >= 1 and key <= counted and key == math.floor(key)
    if not listed then keys[#keys + 1] = key end
  end
  table.sort(keys, function(a, b)
    if type(a) == type(b) and (type(a) == "string" or type(a) == "number") then return a < b end
    return type(a) < type(b) or (type(a) == type(b) and tostring(a) < tostring(b))
  end)
  for i, key in ipairs(keys) do
    if i > MOST_MEMBERS then
      parts[#parts + 1] = ("... %d more"):format(#keys - MOST_MEMBERS)
      break
    end
    local name = type(key) == "string" and key:find("^[%a_][%w_]*$") and key or "[" .. brief(key) .. "]"
    parts[#parts + 1] = name .. " = " .. brief(value[key])
  end
  local line = "{" .. table.concat(parts, ", ") .. "}"
  if #line <= 96 then return line end
  return "{\n  " .. table.concat(parts, ",\n  ") .. "\n}"
end

--- A value as the REPL prints it.
-- @function show
function repl.show(value)
  if type(value) ~= "table" then return tostring(value) end
  local metatable = getmetatable(value)
  if type(metatable) == "table" and metatable.__tostring then return tostring(value) end
  return table_text(value)
end

-- ---- Evaluation --------------------------------------------------------------------------------------

local function report(message)
  io.stdout:flush()
  io.stderr:write(tostring(message), "\n")
end

-- Errors of the module name the user's line by themselves; others get a traceback only of the user's own frames.
local function on_error(message)
  if type(message) ~= "string" then
    local metatable = type(message) == "table" and getmetatable(message)
    if not (metatable and metatable.__tostring) then return "error object: " .. repl.show(message) end
    return tostring(message)
  end
  return message
end

--- Compiles what was typed: an expression, or statements. It is left to the interpreter: a loop that LuaJIT has compiled
-- does not notice Ctrl-C.
-- @treturn function or nil, a message, and whether more lines could complete it
-- @function compile
function repl.compile(text, name)
  local expression = text:gsub("^%s*=", "")
  local valued, reason = load("return " .. expression, name, "t")
  if valued then
    -- as the arguments of a call, so that no tail call takes this chunk out of an error's position
    local close = expression:find("--", 1, true) and "\n)" or ")"
    local chunk = load("return (...)(" .. expression .. close, name, "t")
    if chunk then
      jit.off(chunk, true)
      return function() return chunk(function(...) return ... end) end
    end
  end
  -- a local would be gone with its line (or with the lines pasted together), so one that a line begins with is made a global
  local globals = text:gsub("^(%s*)local%s+", "%1", 1):gsub("\nlocal%s+([^\n]*)", function(rest)
    local names_alone = rest:find "^[%a_][%w_%s,]*$" and not rest:find "^function%f[%s]"
    return "\n" .. rest .. (names_alone and " = nil" or "")
  end)
  local chunk, message = load(globals, name, "t")
  if not chunk or text:find "^%s*local%s+[%w_%s,]*$" then chunk, message = load(text, name, "t") end
  if chunk then
    jit.off(chunk, true)
    return chunk
  end
  local function ends_too_soon(complaint)
    return complaint:find("near '<eof>'", 1, true) or complaint:find("near <eof>", 1, true)
      or complaint:find("unfinished long", 1, true)
  end
  return nil, message, (ends_too_soon(message) or ends_too_soon(reason)) ~= nil
end

local function print_results(ok, ...)
  if not ok then
    report((...))
    return false
  end
  for i = 1, select("#", ...) do print(repl.show((select(i, ...)))) end
  return true
end

-- Runs a chunk and prints what it returns; printing a value may raise too.
local function run(chunk)
  console.arm()
  local ok, result = xpcall(function() return print_results(xpcall(chunk, on_error)) end, on_error)
  console.arm()
  if not ok then report(result) end
  return ok and result
end

-- ---- The loop ----------------------------------------------------------------------------------------

local function history_file()
  if os.getenv("CUFLASH_HISTORY") then return os.getenv("CUFLASH_HISTORY") end
  local home = os.getenv("HOME")
  return home and home .. "/.cuflash_history" or ""
end

local function banner()
  local available, reason = cf.cuda.is_available()
  local devices = available and ("%d CUDA device(s)"):format(cf.cuda.device_count())
    or "no CUDA: " .. reason:gsub("^device cuda:0: ", "")
  print(("cuflash %s on %s. CPU kernels: %s, %d threads; %s."):format(cf.version, jit.version, cf.cpu.isa(),
    cf.num_threads(), devices))
  print("The module is the global cf. ? for help, Tab completes, Ctrl-D leaves.")
end

-- Several lines become one in the history, unless a comment would then swallow what follows it.
local function remember(reader, text)
  if not text:find("--", 1, true) then text = text:gsub("\n", " ") end
  for line in text:gmatch("[^\n]+") do reader.remember(line) end
end

-- One prompt's worth: reads until a chunk is complete and runs it. Returns "end" at the end of input, otherwise whether
-- it went well.
local function turn(reader, interactive)
  local text
  while true do
    local prompt = interactive and (text and ">> " or "> ") or ""
    local line = reader.read(prompt)
    if line == nil then
      if not text then return "end" end
      local _, message = repl.compile(text, "=stdin")
      report(message)
      return interactive and true or false
    end
    if not text and line:find("^%s*%?") then
      if interactive then reader.remember(line) end
      print(help.text(line:match("^%s*%?%s*(.-)%s*$")))
      return true
    end
    local word = not text and line:match("^%s*(%a+)[%s()]*$")
    if word == "help" and rawget(_G, "help") == nil then
      print(help.text())
      return true
    elseif (word == "exit" or word == "quit") and rawget(_G, word) == nil then
      return "end"
    end
    text = text and text .. "\n" .. line or line
    if not text:find("%S") then return true end
    local chunk, message, incomplete = repl.compile(text, "=stdin")
    if chunk or not incomplete then
      if interactive then remember(reader, text) end
      if chunk then return run(chunk) end
      report(message)
      return false
    end
  end
end

--- Reads and evaluates until the input ends.
-- @treturn boolean whether nothing failed
-- @function loop
function repl.loop()
  local interactive = console.is_interactive()
  if interactive then banner() end
  local reader = console.reader(interactive and history_file() or "", function(line, word)
    return complete.words(line, word, _G)
  end)
  local all_well = true
  while true do
    console.arm()
    local ok, result = pcall(turn, reader, interactive)
    if not ok then
      console.arm()
      if tostring(result):find("interrupted!", 1, true) then
        reader.give_up()
      else
        report(result)
      end
    elseif result == "end" then
      break
    elseif result == false then
      all_well = false
    end
  end
  if interactive then print() end
  reader.close()
  return all_well
end

-- ---- The command line --------------------------------------------------------------------------------

local function fail(message)
  io.stderr:write(message, "\n")
  return 1
end

local function execute(chunk, message, ...)
  if not chunk then return fail("script/repl: " .. message) end
  console.arm()
  local ok, problem = xpcall(function(...) return chunk(...) end, function(e)
    return type(e) == "string" and debug.traceback(e, 2) or on_error(e)
  end, ...)
  if not ok then return fail("script/repl: " .. problem) end
  return 0
end

-- The options in the order given: a list of {letter, value}, and where the script's name stands.
local function parse(arguments)
  local actions, at = {}, 1
  while arguments[at] and arguments[at]:find("^%-.") do
    local letter, value = arguments[at]:match("^%-([elivh])(.*)$")
    if arguments[at] == "--help" then letter, value = "h", "" end
    if arguments[at] == "--" then return actions, at + 1 end
    if not letter then return nil, ("unknown option %s\n%s"):format(arguments[at], USAGE) end
    if letter == "e" or letter == "l" then
      if value == "" then
        at = at + 1
        value = arguments[at]
      end
      if not value then return nil, ("option -%s needs a value\n%s"):format(letter, USAGE) end
    end
    actions[#actions + 1] = { letter, value }
    at = at + 1
  end
  return actions, at
end

--- The program: takes the command line, returns the exit status.
-- @tparam {string,...} arguments
-- @treturn number
-- @function main
function repl.main(arguments)
  local actions, at = parse(arguments)
  if not actions then return fail("script/repl: " .. at) end
  _G.cf = cf
  local interactive, ran = false, false
  for _, action in ipairs(actions) do
    local letter, value = action[1], action[2]
    local status = 0
    if letter == "h" then
      print(USAGE)
      return 0
    elseif letter == "v" then
      print(("cuflash %s, %s"):format(cf.version, jit.version))
      ran = true
    elseif letter == "i" then
      interactive = true
    elseif letter == "l" then
      status = execute(function() require(value) end)
    else
      status = execute(loadstring(value, "=(command line)"))
      ran = true
    end
    if status ~= 0 then return status end
  end
  if arguments[at] then
    ran = true
    local script = { [0] = arguments[at] }
    for i = at + 1, #arguments do script[i - at] = arguments[i] end
    _G.arg = script
    local chunk, message = loadfile(arguments[at] ~= "-" and arguments[at] or nil)
    local status = execute(chunk, message, unpack(script))
    if status ~= 0 then return status end
  end
  if ran and not interactive then return 0 end
  return repl.loop() and 0 or (console.is_interactive() and 0 or 1)
end

return repl
