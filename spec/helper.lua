-- What the specs share. busted loads it first; a spec that needs a function of it does require "spec.helper".

local cf = require "spec.support.on_device"
local assert = require "luassert"
local say = require "say"

local helper = {}

--- The device that is tested, as $CUFLASH_SPEC_DEVICE has it and as tensors have it: "cuda" and "cuda:0".
helper.device = os.getenv "CUFLASH_SPEC_DEVICE" or "cpu"
helper.device_name = cf.empty({ 1 }).device

-- ---- Assertions --------------------------------------------------------------------------------------

-- assert.raises_at_caller(f, text): f raises a message that holds the text and begins with a line of f's own.
local function raises_at_caller(state, arguments)
  local f, text = arguments[1], arguments[2]
  local ok, message = pcall(f)
  local where = debug.getinfo(f, "S")
  local file, line = tostring(message):match("^([^\n]-):(%d+): ")
  line = tonumber(line)
  local at_caller = file == where.short_src and line >= where.linedefined and line <= where.lastlinedefined
  state.failure_message = ("expected an error at %s:%d..%d holding %q, got %s"):format(where.short_src, where.linedefined,
    where.lastlinedefined, text, ok and "none" or tostring(message))
  return not ok and at_caller and tostring(message):find(text, 1, true) ~= nil
end
say:set("assertion.raises_at_caller.positive", "expected another error:\n%s\n%s")
assert:register("assertion", "raises_at_caller", raises_at_caller, "assertion.raises_at_caller.positive")

-- assert.tensor(t, values, dtype): t has exactly these (nested) values, and this dtype where given.
local function has_values(state, arguments)
  local tensor, values, dtype = arguments[1], arguments[2], arguments[3]
  local got = tensor:totable()
  local function same(a, b)
    if type(a) ~= "table" or type(b) ~= "table" then return a == b or (a ~= a and b ~= b) end
    if #a ~= #b then return false end
    for i = 1, #a do
      if not same(a[i], b[i]) then return false end
    end
    return true
  end
  state.failure_message = ("expected other values, got\n%s"):format(tostring(tensor))
  return same(got, values) and (dtype == nil or tensor.dtype == dtype)
end
say:set("assertion.tensor.positive", "expected other values:\n%s\n%s")
assert:register("assertion", "tensor", has_values, "assertion.tensor.positive")

-- ---- Memory ------------------------------------------------------------------------------------------

--- The storages alive on the tested device once all garbage is collected.
function helper.live_storages()
  collectgarbage()
  collectgarbage()
  return cf.memory_stats().live_storages
end

-- ---- Files and programs ------------------------------------------------------------------------------

local temporary = {}

--- A new name for a temporary file, gone after the spec that calls helper.remove_files.
function helper.file_name()
  local name = os.tmpname()
  temporary[#temporary + 1] = name
  return name
end

function helper.remove_files()
  for _, name in ipairs(temporary) do os.remove(name) end
  temporary = {}
end

function helper.write(path, bytes)
  local file = assert(io.open(path, "wb"))
  file:write(bytes)
  file:close()
end

function helper.read(path)
  local file = assert(io.open(path, "rb"))
  local bytes = file:read("*a")
  file:close()
  return bytes
end

--- A string as one word of the shell.
function helper.quote(text)
  return "'" .. text:gsub("'", "'\\''") .. "'"
end

--- Runs a shell command; gives its output, standard error included, and its exit status.
function helper.run(command)
  local pipe = assert(io.popen("{ " .. command .. "\n} 2>&1; echo \"status:$?\""))
  local output = pipe:read("*a")
  pipe:close()
  local text, status = output:match("^(.*)status:(%d+)\n$")
  return text, tonumber(status)
end

-- Where the Lua files are, for a luajit that starts afresh.
local lua = package.searchpath("cuflash", package.path):match("^(.*)cuflash/init.lua$")
local lua_path = helper.quote(lua .. "?.lua;" .. lua .. "?/init.lua;" .. package.path)

--- Runs Lua code in a plain luajit that finds the module, with NAME=value words before it; gives what helper.run gives.
function helper.luajit(code, environment)
  return helper.run(("LUA_PATH=%s %s luajit -e %s"):format(lua_path, environment or "", helper.quote(code)))
end

local python

--- The first Python that has a module, of $CUFLASH_PYTHON, python3 on the PATH and /usr/bin/python3; or nil and why.
function helper.python(module)
  python = python or {}
  if python[module] == nil then
    python[module] = false
    for _, candidate in ipairs { os.getenv("CUFLASH_PYTHON") or "", "python3", "/usr/bin/python3" } do
      if candidate ~= "" and select(2, helper.run(candidate .. " -c 'import " .. module .. "'")) == 0 then
        python[module] = candidate
        break
      end
    end
  end
  return python[module] or nil, "no Python with " .. module .. " found (CUFLASH_PYTHON may name one)"
end

-- ---- A GPU -------------------------------------------------------------------------------------------

local has_gpu, no_gpu = cf.cuda.is_available()

--- busted's `it` for what needs a CUDA device: pending, with the reason, where there is none. Garbage is collected after it.
function helper.on_gpu(name, f)
  local spec = getfenv(f) -- where busted's functions are
  spec.it(name, function()
    if not has_gpu then spec.pending(no_gpu) end
    f()
    collectgarbage()
    collectgarbage()
  end)
end

return helper
