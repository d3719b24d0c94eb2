--- Files: sizes, reading and writing memory without a detour through Lua strings, and replacing a file whole.
-- What fails here is not the caller's mistake, so it comes back as nil and a message that names the file.
-- @module cuflash.files

local ffi = require "ffi"

local files = {}

ffi.cdef [[
size_t cuflash_lua_fread(void *data, size_t size, size_t count, void *file) __asm__("fread");
size_t cuflash_lua_fwrite(const void *data, size_t size, size_t count, void *file) __asm__("fwrite");
int cuflash_lua_statx(int directory, const char *path, int flags, unsigned mask, void *buffer) __asm__("statx");
char *cuflash_lua_realpath(const char *path, char *resolved) __asm__("realpath");
void cuflash_lua_free(void *pointer) __asm__("free");
char *cuflash_lua_strerror(int number) __asm__("strerror");
int cuflash_lua_getpid(void) __asm__("getpid");
]]

local KINDS = { [0x1] = "a pipe", [0x2] = "a device", [0x4] = "a directory", [0x6] = "a device", [0x8] = "file",
  [0xc] = "a socket" }

-- What is at a path: "file", "a directory" ...; nil if nothing is, or if this system cannot tell.
local function kind_of(path)
  local buffer = ffi.new "uint8_t[256]" -- struct statx: the same on every Linux; the mode is at byte 28
  local ok, result = pcall(function() return ffi.C.cuflash_lua_statx(-100, path, 0, 1, buffer) end)
  if not ok or result ~= 0 then return nil end
  return KINDS[math.floor((buffer[28] + 256 * buffer[29]) / 4096)]
end

--- Opens a regular file for reading.
-- @treturn file
-- @treturn number its size in bytes; or nil and a message
-- @function open
function files.open(path)
  local kind = kind_of(path)
  if kind and kind ~= "file" then return nil, ("%s: it is %s, not a file"):format(path, kind) end
  local file, message = io.open(path, "rb")
  if not file then return nil, message end
  local size = file:seek("end")
  if not size or not file:seek("set", 0) then
    file:close()
    return nil, ("%s: cannot tell its size"):format(path)
  end
  return file, size
end

--- Reads bytes into memory.
-- @treturn boolean whether all of them came
-- @function read
function files.read(file, data, bytes)
  return tonumber(ffi.C.cuflash_lua_fread(data, 1, bytes, file)) == bytes
end

--- Writes bytes from memory.
-- @treturn boolean true; or nil and the system's reason
-- @function write
function files.write(file, data, bytes)
  if tonumber(ffi.C.cuflash_lua_fwrite(data, 1, bytes, file)) == bytes then return true end
  return nil, ffi.string(ffi.C.cuflash_lua_strerror(ffi.errno()))
end

-- Where a path leads: symbolic links followed.
local function resolve(path)
  local ok, pointer = pcall(function() return ffi.C.cuflash_lua_realpath(path, nil) end)
  if not ok or pointer == nil then return path end
  local resolved = ffi.string(pointer)
  ffi.C.cuflash_lua_free(pointer)
  return resolved
end

local serial = 0

--- Writes a file whole or not at all: into a temporary file beside it, which then takes its name. What exists and is
-- no regular file (a pipe, /dev/stdout) is written to directly.
-- @tparam string path
-- @tparam function write takes the file, returns true, or nil and a message
-- @treturn boolean true, or nil and a message
-- @function replace
function files.replace(path, write)
  local kind = kind_of(path)
  if kind == "a directory" then return nil, ("%s: it is a directory"):format(path) end
  local direct = kind ~= nil and kind ~= "file"
  local target = direct and path or resolve(path)
  serial = serial + 1
  local temporary = direct and path or ("%s.tmp-%d-%d"):format(target, ffi.C.cuflash_lua_getpid(), serial)

  local file, message = io.open(temporary, "wb")
  if not file then return nil, ("%s: cannot write it: %s"):format(path, (message:gsub("^.*: ", ""))) end
  local called, ok, reason = pcall(write, file)
  -- what was buffered may fail only now
  local flushed, why = file:flush()
  local closed = file:close()
  if called and ok and flushed and closed then
    if direct then return true end
    local renamed, problem = os.rename(temporary, target)
    if renamed then return true end
    reason = problem
  end
  if not direct then os.remove(temporary) end
  if not called then error(ok, 0) end
  return nil, ("%s: cannot write it: %s"):format(path, reason or why or "the disk may be full")
end

return files
