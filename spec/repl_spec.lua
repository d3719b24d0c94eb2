local helper = require "spec.helper"

local lib = package.loaded["cuflash.library"].path
local root = package.searchpath("cuflash", package.path):match("^(.*)lua/cuflash/init.lua$")
local program = root .. "script/repl"
local environment = "CUFLASH_LIB=" .. helper.quote(lib) .. " "

local function repl(input, arguments)
  local path = helper.file_name()
  helper.write(path, input)
  return helper.run(environment .. program .. " " .. (arguments or "") .. " < " .. path)
end

describe("the REPL on a pipe", function()
  after_each(helper.remove_files)

  local cases = {
    { "prints the values of expressions", "1 + 1\n'a', nil, true\n", "2\na\nnil\ntrue\n" },
    { "knows cf, and prints tensors", "cf.arange(3)\n", "  1  2  3\n[cf.Tensor float32 3 cpu]\n" },
    { "runs statements, and keeps globals", "x = 5\nx * 2\n", "10\n" },
    { "takes = as an expression's mark", "= 7\n", "7\n" },
    { "continues an incomplete chunk", "for i = 1, 2 do\nprint(i)\nend\ncf.full({1,\n2}, 3):sum()\n", "1\n2\n6\n" },
    { "continues an incomplete expression", "1 +\n2\n", "3\n" },
    { "knows the words a newcomer tries", "help\nexit\n1\n", "Help on a function: ? name", "prefix" },
    { "leaves at exit", "1\nexit()\n2\n", "1\n" },
    { "lets a user's own names be", "exit = 3\nexit\n", "3\n" },
    { "shows tables", "{1, 'b', x = {}, y = cf.ones {2}}.y\n({1, 'b', k = cf.ones {2}})\n",
      "stdin:1: unexpected symbol near '{'\n{1, \"b\", k = [cf.Tensor float32 2 cpu]}\n" },
    { "goes on after an error, at the user's line", "error 'oops'\ncf.zeros(3)\n1\n",
      "stdin:1: oops\nstdin:1: zeros: argument 'shape': expected a table of sizes such as {2, 3}, got 3\n1\n" },
    { "goes on after a syntax error", "1 +* 2\n3\n", "stdin:1: unexpected symbol near '1'\n3\n" },
    { "goes on after an error that is no text", "error({})\nerror()\n2\n", "error object: {}\nerror object: nil\n2\n" },
    { "does not take bytecode", "\27LJ\n2\n", "stdin: cannot load incompatible bytecode\n2\n", "attempt to load" },
    { "keeps what a line declares local", "local a, b = 3, 4\na + b\nlocal function f() return a end\nf()\n", "7\n3\n" },
    { "takes a local without a value", "local z\nz\n", "nil\n" },
    { "explains", "? cf.arange\n", "cf.arange(first, last[, step[, options]])\n", "prefix" },
    { "explains methods", "?tensor.narrow\n", "t:narrow(dim, start, length)\n", "prefix" },
    { "explains a method by its bare name", "? narrow\n", "t:narrow(dim, start, length)\n", "prefix" },
    { "explains streams", "? stream:wait\n", "stream:wait(event)\n", "prefix" },
    { "explains a function of a table by its bare name", "? with_stream\n", "cf.cuda.with_stream(stream, f, ...)\n", "prefix" },
    { "explains contexts", "? ctx:backward\n", "ctx:backward(d_o[, options])\n", "prefix" },
    { "suggests what may be meant", "? atention\n", "no help on 'atention' (did you mean 'attention'?); ? alone lists what there is\n" },
    { "lists what there is", "?\n", "Help on a function: ? name", "prefix" },
  }
  for _, case in ipairs(cases) do
    it(case[1], function()
      local output = repl(case[2])
      if case[4] == "prefix" then
        output = output:sub(1, #case[3])
      elseif case[4] then
        assert.truthy(output:find(case[4], 1, true), output)
        return
      end
      assert.are.equal(case[3], output)
    end)
  end

  it("keeps what lines pasted together declare local", function()
    local chunk = require("cuflash.repl").compile(
      "local repl_a = 3\nlocal repl_b\nlocal function repl_f()\n  local inner = repl_a\n  return inner\nend\nlocal repl_c = repl_f() + 1", "=stdin")
    chunk()
    local env = getfenv(chunk)
    assert.are.same({ 3, 4, 3 }, { env.repl_a, env.repl_c, env.repl_f() })
    assert.is_nil(env.repl_b)
    assert.is_nil(env.inner)
    env.repl_a, env.repl_c, env.repl_f = nil, nil, nil
  end)

  it("has help on every public function", function()
    local cf = require "cuflash"
    local help = require "cuflash.help"
    local documented = {}
    for _, name in ipairs(help.names()) do documented[name] = true end
    local missing = {}
    local function visit(prefix, functions)
      for name, f in pairs(functions) do
        if type(f) == "table" then
          visit(prefix .. name .. ".", f)
        elseif type(f) == "function" and not documented[prefix .. name] and not documented["tensor:" .. name] then
          missing[#missing + 1] = prefix .. name
        end
      end
    end
    visit("", cf)
    for name in pairs(require("cuflash.tensor").methods) do
      local plain = name:gsub("_$", "")
      if not documented["tensor:" .. name] and not documented["tensor:" .. plain] then missing[#missing + 1] = ":" .. name end
    end
    for class, functions in pairs { stream = require("cuflash.stream").Stream, event = require("cuflash.stream").Event } do
      for name in pairs(functions) do
        if not name:find "^__" and not documented[class .. ":" .. name] then missing[#missing + 1] = class .. ":" .. name end
      end
    end
    table.sort(missing)
    assert.are.same({}, missing)
    for name in pairs(documented) do
      local text = help.text(name)
      assert.falsy(text:find("no help", 1, true), name)
      for line in text:gmatch("[^\n]+") do assert.is_true(#line <= 100, line) end
    end
  end)

  it("completes globals, fields and methods", function()
    local complete = require "cuflash.complete"
    local cf = require "cuflash"
    local globals = { cf = cf, q = cf.zeros { 1 }, count = 1, text = "x" }
    local function words(line, word) return complete.words(line, word or line, globals) end
    assert.are.same({ "cf", "count" }, words("c"))
    assert.are.same({ "cf.save", "cf.safetensors" }, { words("cf.sa")[2], words("cf.sa")[1] })
    assert.are.same({ "cf.cuda.is_available" }, words("cf.cuda.i"))
    assert.are.same({ "q:transpose" }, words("print(q:tran", "q:tran"))
    assert.are.same({ "q.dtype" }, words("q.dt"))
    assert.are.same({}, words("q:dt"))
    assert.are.same({ "text:gmatch", "text:gsub" }, words("text:g"))
    assert.are.same({ "tensor.narrow" }, words("? tensor.na", "tensor.na"))
    assert.are.same({ "while" }, words("whi"))
    assert.are.same({}, words("nothing.x"))
  end)
end)

describe("the REPL's command line", function()
  after_each(helper.remove_files)

  it("runs code, in order, and leaves", function()
    assert.are.equal("1\t2\n", (helper.run(environment .. program .. " -e 'x = 1' -e 'print(x, cf.ones{2}:sum())'")))
  end)

  it("runs a script with its arguments", function()
    local path = helper.file_name()
    helper.write(path, "print(arg[1], select('#', ...), ..., cf.version ~= nil)")
    assert.are.equal("a\t2\ta\ttrue\n", (helper.run(environment .. program .. " " .. path .. " a 'b c'")):gsub("b c\t", ""))
  end)

  it("runs standard input as a script", function()
    assert.are.equal("3\n", (repl("local x = 3\nprint(x)\n", "-")))
  end)

  it("fails where the code does", function()
    local output, status = helper.run(environment .. program .. " -e 'error \"oops\"'")
    assert.are.equal(1, status)
    assert.truthy(output:find("(command line):1: oops", 1, true))
    output, status = helper.run(environment .. program .. " -e '1 +'")
    assert.are.equal(1, status)
    assert.truthy(output:find("(command line):1:", 1, true))
    assert.are.equal(1, select(2, helper.run(environment .. program .. " /nowhere/x.lua")))
    output, status = helper.run(environment .. program .. " -z")
    assert.are.equal(1, status)
    assert.truthy(output:find("unknown option -z", 1, true))
    assert.are.equal(1, select(2, repl("error 'x'\n")))
    assert.are.equal(0, select(2, repl("x = 1\n")))
  end)

  it("works from anywhere, and through a link", function()
    local link = helper.file_name()
    helper.run(("ln -sf \"$(realpath %s)\" %s"):format(program, link))
    assert.are.equal("2\n", (helper.run(("cd / && CUFLASH_LIB=\"%s\" %s -e 'print(cf.ones{2}:sum())'")
      :format((helper.run("realpath " .. lib)):gsub("\n", ""), link))))
  end)

  it("says what to do where the library is missing", function()
    local output, status = helper.run("CUFLASH_LIB=/nowhere/x.so " .. program)
    assert.are.equal(1, status)
    assert.truthy(output:find("script/build", 1, true))
  end)
end)

-- A terminal with a person at it: types the steps, waiting for each answer, and prints what the screen got.
local TERMINAL = [[
import os, pty, re, select, sys, time
pid, fd = pty.fork()
if pid == 0:
    os.environ.update(TERM='dumb', INPUTRC='/dev/null')
    os.execvp(sys.argv[1], sys.argv[1:2])
screen = ''
def wait(pattern, seconds=60):
    global screen
    start, end = len(wait.seen), time.time() + seconds
    while not re.search(pattern, screen[start:], re.S):
        ready = select.select([fd], [], [], 0.1)[0]
        if ready:
            try:
                data = os.read(fd, 65536)
            except OSError:
                data = b''
            if not data:
                break
            screen += data.decode(errors='replace')
        if time.time() > end:
            print(screen)
            sys.exit('timed out waiting for ' + pattern)
    wait.seen = screen
wait.seen = ''
for line in sys.stdin.read().splitlines():
    if line.startswith('wait '): wait(line[5:])
    elif line.startswith('sleep '): time.sleep(float(line[6:]))
    else: os.write(fd, line.encode().decode('unicode_escape').encode())
end = time.time() + 20
while time.time() < end:
    try:
        data = os.read(fd, 65536)
    except OSError:
        break
    if not data: break
    screen += data.decode(errors='replace')
_, status = os.waitpid(pid, 0)
print(screen.replace('\r', ''))
print('exit', status)
]]

describe("the REPL on a terminal", function()
  after_each(helper.remove_files)

  local function session(steps, extra)
    local python, why = helper.python("pty")
    if not python then pending(why) end
    if select(2, helper.run(python .. " -c 'import os; os.openpty()'")) ~= 0 then pending("no pseudo-terminal can be had") end
    local script, input, history = helper.file_name(), helper.file_name(), helper.file_name()
    helper.write(script, TERMINAL)
    helper.write(input, table.concat(steps, "\n") .. "\n")
    local output, status = helper.run(("%s %s CUFLASH_HISTORY=%s %s %s %s < %s"):format(environment, extra or "", history, python,
      script, program, input))
    assert.are.equal(0, status, output)
    return output, helper.read(history)
  end

  for _, kind in ipairs { "with readline", "without readline" } do
    -- readline's Lua half stays, its native half is not found
    local extra = kind == "without readline" and "LUA_CPATH=/nowhere/?.so" or ""

    it("greets, evaluates and leaves at Ctrl-D, " .. kind, function()
      local output = session({ "wait > $", "cf.ones{2}:sum()\\r", "wait \\n2\\r?\\n.*> $", "\\x04" }, extra)
      assert.truthy(output:find("cuflash %d+%.%d+%.%d+ on LuaJIT"), output)
      assert.truthy(output:find("\nexit 0\n", 1, true), output)
    end)

    it("gives up a line at Ctrl-C, " .. kind, function()
      local output = session({ "wait > $", "print('wrong'", "wait wrong", "sleep 0.2", "\\x03", "wait \\n(.*)> $",
        "for i = 1, 2 do\\r", "wait >> $", "sleep 0.2", "\\x03", "wait \\n(.*)> $", "'right'\\r", "wait \\nright\\r?\\n.*> $", "\\x04" }, extra)
      assert.falsy(output:find("\nwrong\n", 1, true), output)
      assert.truthy(output:find("\nexit 0\n", 1, true), output)
    end)

    it("interrupts a loop and a long native call, " .. kind, function()
      local output = session({ "wait > $", "while true do end\\r", "sleep 0.5", "\\x03", "wait interrupted!.*> $",
        "(function() while true do end end)()\\r", "sleep 0.5", "\\x03", "wait interrupted!.*> $",
        "q = cf.zeros{1, 64, 32768, 64}\\r", "wait > $", "print('go'); cf.attention(q, q, q)\\r", "wait \\ngo", "sleep 0.5", "\\x03",
        "wait attention: interrupted.*> $", "'alive'\\r", "wait \\nalive\\r?\\n.*> $", "\\x04" }, extra)
      assert.truthy(output:find("\nexit 0\n", 1, true), output)
    end)
  end

  it("completes, and remembers", function()
    if not pcall(require, "readline") then pending("lua-readline is not installed") end
    local output, history = session({ "wait > $", "cf.manual_s\\t(3)\\r", "wait Generator seed 3.*> $", "x = {\\r", "wait >> $", "1}\\r",
      "wait > $", "\\x1b[A", "wait x = \\{ 1\\}", "\\r", "wait > $", "\\x04" }, "")
    assert.truthy(output:find("\nexit 0\n", 1, true), output)
    assert.are.equal("cf.manual_seed(3)\nx = { 1}\n", history)
  end)
end)
