--- Finds and loads libcuflash, and declares its C API from the text the library itself carries.
--
-- The places tried, in this order: `$CUFLASH_LIB`; `cuflash` and `libcuflash` on `package.cpath`; the build tree or
-- the installation that these Lua files are part of; the system's libraries.
-- @module cuflash.library

local ffi = require "ffi"

local ABI_VERSION = 1 -- the cuflash_abi_version that this module is written for

local library = {}

local here = debug.getinfo(1, "S").source:match("^@(.*[/\\])") or "./"

local function exists(path)
  local file = io.open(path, "rb")
  if file then file:close() end
  return file ~= nil
end

-- The candidates in order: {what to load, must the file exist?}.
local function candidates()
  local list = {}
  local chosen = os.getenv("CUFLASH_LIB")
  if chosen and chosen ~= "" then
    return { { chosen, false } } -- asked for by name: nothing else will do
  end
  for _, name in ipairs { "cuflash", "libcuflash" } do
    for template in package.cpath:gmatch("[^;]+") do
      list[#list + 1] = { (template:gsub("%?", name)), true }
    end
  end
  list[#list + 1] = { here .. "../../build/release/libcuflash.so", true } -- <repository>/lua/cuflash/
  for _, lib in ipairs { "lib/", "lib/x86_64-linux-gnu/", "lib/aarch64-linux-gnu/", "lib64/" } do
    list[#list + 1] = { here .. "../../../../" .. lib .. "libcuflash.so", true } -- <prefix>/share/lua/5.1/cuflash/
  end
  list[#list + 1] = { "cuflash", false }
  return list
end

local function open()
  local tried = {}
  for _, candidate in ipairs(candidates()) do
    local path, needs_file = candidate[1], candidate[2]
    if not needs_file or exists(path) then
      local ok, result = pcall(ffi.load, path)
      if ok then return result, path end
      tried[#tried + 1] = ("  %s: %s"):format(path, (tostring(result):gsub("^[^:]*:%d+: ", "")))
    else
      tried[#tried + 1] = ("  %s: no such file"):format(path)
    end
  end
  error("cuflash: cannot load the native library libcuflash.so. Tried:\n" .. table.concat(tried, "\n")
    .. "\nBuild it with script/build, or set CUFLASH_LIB to the path of a libcuflash.so.", 0)
end

local function declare(lib, path)
  ffi.cdef "const char *cuflash_ffi_cdef(void); int cuflash_abi_version(void);"
  local ok, version = pcall(function() return lib.cuflash_abi_version() end)
  if not ok then error(("cuflash: %s is not a cuflash library: %s"):format(path, version), 0) end
  if version ~= ABI_VERSION then
    error(("cuflash: %s has ABI version %d, but these Lua files (%s) are written for version %d; rebuild it with "
      .. "script/build"):format(path, version, here, ABI_VERSION), 0)
  end
  -- A type can be declared once in a process, and this file may be loaded again.
  if not pcall(ffi.typeof, "cuflash_tensor") then ffi.cdef(ffi.string(lib.cuflash_ffi_cdef())) end
end

library.C, library.path = open()
declare(library.C, library.path)

return library
