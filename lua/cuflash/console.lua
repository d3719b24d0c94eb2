--- Reading lines from a person or a pipe, so that Ctrl-C gives up the line and not the program.
-- @module cuflash.console

local ffi = require "ffi"

local console = {}

ffi.cdef [[
typedef struct { int fd; short events, revents; } cuflash_lua_pollfd;
int cuflash_lua_isatty(int fd) __asm__("isatty");
int cuflash_lua_poll(cuflash_lua_pollfd *fds, unsigned long count, int milliseconds) __asm__("poll");
void *cuflash_lua_signal(int number, void *handler) __asm__("signal");
]]

local SIGINT = 2
local POLLIN = 1

local os_calls = ffi.C

--- Whether a person reads and writes: input and output are a terminal.
-- @function is_interactive
function console.is_interactive()
  return os_calls.cuflash_lua_isatty(0) == 1 and os_calls.cuflash_lua_isatty(1) == 1
end

-- luajit sets a handler for SIGINT before it runs a script. The handler makes the running Lua code raise "interrupted!", but
-- only once: it puts the default action back, which ends the process. So the handler is kept, and set again.
local handler = os_calls.cuflash_lua_signal(SIGINT, nil)
os_calls.cuflash_lua_signal(SIGINT, handler)

--- Makes the next Ctrl-C an error in the Lua code that is running.
-- @function arm
function console.arm()
  os_calls.cuflash_lua_signal(SIGINT, handler)
end

-- Waits until a byte can be read from standard input. Ctrl-C ends the wait, and then raises.
local function wait_for_input()
  local fds = ffi.new("cuflash_lua_pollfd[1]")
  fds[0].fd, fds[0].events = 0, POLLIN
  repeat
    local ready = os_calls.cuflash_lua_poll(fds, 1, -1)
  until ready == 1
end
jit.off(wait_for_input) -- compiled code would not notice

local function plain_reader()
  local interactive = console.is_interactive()
  if interactive then io.stdin:setvbuf("no") end -- a line held in a buffer would not wake the wait
  return {
    read = function(prompt)
      io.stdout:write(prompt)
      io.stdout:flush()
      if interactive then wait_for_input() end
      return io.read("*l")
    end,
    give_up = function() print() end,
    remember = function() end,
    close = function() end,
  }
end

ffi.cdef [[
int rl_completion_append_character;
int rl_stuff_char(int c);
void rl_replace_line(const char *text, int clear_undo);
]]

-- The libreadline that the Lua module brought into this process, for what the module does not offer.
local function native_readline()
  local maps = io.open("/proc/self/maps")
  if not maps then return nil end
  local path = maps:read("*a"):match("(/%S*libreadline%.so%S*)")
  maps:close()
  if not path then return nil end
  local ok, library = pcall(ffi.load, path)
  return ok and library or nil
end

local function readline_reader(readline, native, history, completer)
  readline.set_options { histfile = history, keeplines = 2000, completion = true, auto_add = false }
  readline.set_readline_name("cuflash")
  readline.set_complete_function(function(line, from, to)
    native.rl_completion_append_character = 0 -- readline sets a space before each completion
    local ok, words = pcall(completer, line:sub(1, to), line:sub(from, to))
    return ok and words or {}
  end)
  local last, line, done
  return {
    read = function(prompt)
      line, done = nil, false
      readline.handler_install(prompt, function(text)
        line, done = text, true
        readline.handler_remove()
      end)
      -- the callback interface: while a line is edited Lua is what waits, and Ctrl-C reaches it
      while not done do
        wait_for_input()
        readline.read_char()
      end
      return line
    end,
    -- Ends the line being edited as Enter would: handler_remove is safe only then.
    give_up = function()
      io.stdout:write("^C")
      io.stdout:flush()
      native.rl_replace_line("", 0)
      for _ = 1, 3 do
        if done ~= false then break end
        native.rl_stuff_char(13)
        readline.read_char()
      end
      done = nil
    end,
    remember = function(text)
      if text ~= last and text:find("%S") then readline.add_history(text) end
      last = text
    end,
    close = function() if history ~= "" then readline.save_history() end end,
  }
end

--- Something to read lines with: read(prompt) gives a line, or nil at the end; give_up() drops a line that Ctrl-C
-- interrupted; remember(text) adds to the history; close() saves it.
-- @tparam string history a file, or "" for none
-- @tparam function completer takes the line and the word to complete, returns a list
-- @function reader
function console.reader(history, completer)
  if not console.is_interactive() then return plain_reader() end
  local ok, readline = pcall(require, "readline")
  if not ok or type(readline) ~= "table" or not readline.handler_install then return plain_reader() end
  local native = native_readline()
  if not native then return plain_reader() end
  return readline_reader(readline, native, history, completer)
end

return console
