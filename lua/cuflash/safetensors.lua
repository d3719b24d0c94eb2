--- safetensors files: several named tensors in one file, and text metadata.
--
-- The format: 8 bytes of header length, a JSON header that gives each name its dtype, shape and place, then the data.
-- Needs the Lua module dkjson.
-- @module cuflash.safetensors

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"
local memory = require "cuflash.memory"
local copies = require "cuflash.copies"
local files = require "cuflash.files"

local safetensors = {}

local C = native.C

local NAMES = { float32 = "F32", float16 = "F16", bfloat16 = "BF16", float64 = "F64" }
local KINDS = {}
for name, code in pairs(NAMES) do KINDS[code] = dtype.by_name[name] end

local METADATA = "__metadata__"
local LONGEST_HEADER = 100 * 10 ^ 6 -- as the format's own implementation has it

local function json()
  local ok, module = pcall(require, "dkjson")
  if not ok then
    errors.raise("safetensors: the Lua module dkjson is needed; install it with `apt install lua-dkjson` or "
      .. "`luarocks --lua-version=5.1 install dkjson`")
  end
  return module
end

-- ---- Writing -----------------------------------------------------------------------------------------

-- Names in the order their data is written: wide types first, so that every tensor is aligned.
local function ordered(tensors)
  local names = {}
  for name in pairs(tensors) do names[#names + 1] = name end
  table.sort(names, function(a, b)
    local left, right = dtype.of(tensors[a]).size, dtype.of(tensors[b]).size
    if left ~= right then return left > right end
    return a < b
  end)
  return names
end

local function check_tensors(name, tensors)
  if type(tensors) ~= "table" then checks.fail(name, "tensors", "a table of tensors by name", tensors) end
  for key, tensor in pairs(tensors) do
    if type(key) ~= "string" then
      errors.raise("%s: argument 'tensors': expected names as keys, got %s", name, checks.describe(key))
    elseif key == METADATA then
      errors.raise("%s: argument 'tensors': the name %s is taken; use the option 'metadata'", name, METADATA)
    end
    checks.tensor(name, ("tensors.%s"):format(key), tensor)
  end
end

local function check_metadata(name, metadata)
  if metadata == nil then return nil end
  if type(metadata) ~= "table" then checks.fail(name, "metadata", "a table of strings by name", metadata) end
  for key, value in pairs(metadata) do
    if type(key) ~= "string" or type(value) ~= "string" then
      errors.raise("%s: argument 'metadata': expected strings by name, got %s at [%s]", name, checks.describe(value),
        tostring(key))
    end
  end
  return metadata
end

--- Writes tensors by name to a safetensors file, whole or not at all.
-- @tparam string path
-- @tparam table tensors name -> tensor
-- @tparam[opt] table options metadata: a table of strings by name
-- @treturn boolean true; or nil and a message
-- @function safetensors.save
function safetensors.save(path, tensors, options)
  local name = "safetensors.save"
  checks.path(name, "path", path)
  check_tensors(name, tensors)
  options = checks.options(name, options, { metadata = true })
  local metadata = check_metadata(name, options.metadata)
  local encode = json().encode

  local names, entries, at = ordered(tensors), {}, 0
  if metadata then
    local copy = setmetatable({}, { __jsontype = "object" }) -- {} would be written as a list
    for key, value in pairs(metadata) do copy[key] = value end
    entries[1] = encode(METADATA) .. ":" .. encode(copy)
  end
  for _, key in ipairs(names) do
    local tensor = tensors[key]
    local bytes = tensor:numel() * dtype.of(tensor).size
    entries[#entries + 1] = ('%s:{"dtype":"%s","shape":[%s],"data_offsets":[%.0f,%.0f]}'):format(encode(key),
      NAMES[tensor.dtype], table.concat(handle.sizes(tensor), ","), at, at + bytes)
    at = at + bytes
  end
  local header = "{" .. table.concat(entries, ",") .. "}"
  header = header .. (" "):rep(-#header % 8)

  return files.replace(path, function(file)
    local length = ffi.new("uint64_t[1]", #header)
    local written, why = file:write(ffi.string(length, 8), header)
    if not written then return nil, why end
    for _, key in ipairs(names) do
      local tensor = tensors[key]
      local source = copies.to(name, tensor, dtype.of(tensor), C.CUFLASH_CPU):contiguous()
      written, why = files.write(file, source.handle.data, source:numel() * dtype.of(source).size)
      if not rawequal(source, tensor) then source:free() end
      if not written then return nil, why end
    end
    return true
  end)
end

-- ---- Reading -----------------------------------------------------------------------------------------

-- The number of keys in a JSON text, each counted as often as it is written. A decoder keeps one of each name, so a
-- difference to what it returns tells of duplicates.
local function count_keys(text)
  local count, at = 0, 1
  while true do
    local from = text:find('"', at, true)
    if not from then return count end
    local to = from + 1
    while true do
      to = text:find('["\\]', to)
      if not to then return count end
      if text:byte(to) == 34 then break end
      to = to + 2
    end
    if text:find("^%s*:", to + 1) then count = count + 1 end
    at = to + 1
  end
end

local function is_object(value)
  local metatable = type(value) == "table" and getmetatable(value)
  return metatable and metatable.__jsontype == "object"
end

local function count_members(value)
  if type(value) ~= "table" then return 0 end
  local count = 0
  for _, member in pairs(value) do count = count + (is_object(value) and 1 or 0) + count_members(member) end
  return count
end

local function is_count(value)
  return type(value) == "number" and value >= 0 and value == math.floor(value) and value <= 2 ^ 53
end

-- Checks one entry of the header against the size of the data.
local function check_entry(name, entry, available)
  local function wrong(...) return nil, ("tensor '%s': %s"):format(name, (...):format(select(2, ...))) end
  if not is_object(entry) then return wrong("its entry is not an object") end
  if type(entry.dtype) ~= "string" then return wrong("it has no dtype") end
  local shape, offsets = entry.shape, entry.data_offsets
  if type(shape) ~= "table" or is_object(shape) then return wrong("it has no shape") end
  if type(offsets) ~= "table" or #offsets ~= 2 or not is_count(offsets[1]) or not is_count(offsets[2]) then
    return wrong("its data_offsets are not two whole numbers")
  end
  local from, to = offsets[1], offsets[2]
  if from > to then return wrong("its data ends (%.0f) before it begins (%.0f)", to, from) end
  if to > available then return wrong("its data ends at %.0f, the file has %.0f bytes of data", to, available) end
  local count = 1
  for i = 1, #shape do
    if not is_count(shape[i]) then return wrong("its shape holds %s", checks.describe(shape[i])) end
    count = count * shape[i]
  end
  local kind = KINDS[entry.dtype]
  if kind and count * kind.size ~= to - from then
    return wrong("%s %s needs %.0f bytes, its data has %.0f", entry.dtype, handle.shape_text(shape), count * kind.size,
      to - from)
  end
  return { name = name, code = entry.dtype, kind = kind, sizes = shape, count = count, from = from, to = to }
end

-- Every byte of the data must belong to exactly one tensor.
local function check_places(entries, available)
  table.sort(entries, function(a, b)
    if a.from ~= b.from then return a.from < b.from end
    if a.to ~= b.to then return a.to < b.to end
    return a.name < b.name
  end)
  local at = 0
  for i, entry in ipairs(entries) do
    if entry.from < at then
      return nil, ("tensors '%s' and '%s' overlap"):format(entries[i - 1].name, entry.name)
    elseif entry.from > at then
      return nil, ("bytes %.0f to %.0f belong to no tensor"):format(at, entry.from)
    end
    at = entry.to
  end
  if at ~= available then return nil, ("bytes %.0f to %.0f belong to no tensor"):format(at, available) end
  return true
end

-- The checked entries in the order of their data, the metadata, and where the data begins.
local function read_header(file, size)
  if size < 8 then return nil, "it is not a safetensors file: it has only " .. size .. " bytes" end
  local length_bytes = file:read(8)
  if not length_bytes or #length_bytes < 8 then return nil, "it cannot be read" end
  local length = tonumber(ffi.cast("const uint64_t *", length_bytes)[0])
  if length > LONGEST_HEADER or length > size - 8 then
    return nil, ("its header claims %.0f bytes, the file has %.0f left; it may be no safetensors file"):format(length, size - 8)
  end
  local text = length > 0 and file:read(length) or ""
  if #text < length then return nil, "it ends within its header" end
  local decode = json().decode
  local decoded, header, after, problem = pcall(decode, text)
  if not decoded or not is_object(header) then
    return nil, "its header is not a JSON object" .. (decoded and problem and ": " .. problem or "")
  end
  if text:find("%S", after) then return nil, "its header has text after the JSON object" end
  if count_keys(text) ~= count_members(header) then return nil, "its header uses a name twice" end
  local entries, available = {}, size - 8 - length
  local metadata = header[METADATA]
  header[METADATA] = nil
  for name, entry in pairs(header) do
    local checked, message = check_entry(name, entry, available)
    if not checked then return nil, message end
    entries[#entries + 1] = checked
  end
  local ok, message = check_places(entries, available)
  if not ok then return nil, message end
  if metadata ~= nil then
    if not is_object(metadata) then return nil, "its metadata is not an object" end
    for key, value in pairs(metadata) do
      if type(value) ~= "string" then return nil, ("its metadata '%s' is not a string"):format(key) end
    end
  end
  return entries, metadata or {}, 8 + length
end

-- Keeps the entries that are wanted, and says what cannot be read among them.
local function choose(entries, names)
  local wanted, chosen = {}, {}
  for _, name in ipairs(names or {}) do wanted[name] = true end
  for _, entry in ipairs(entries) do
    if not names or wanted[entry.name] then
      if not entry.kind then
        return nil, ("tensor '%s' is of dtype %s, which cuflash cannot read; the option 'names' chooses others")
          :format(entry.name, entry.code)
      elseif entry.count == 0 or #entry.sizes > tonumber(C.CUFLASH_MAX_DIMS) then
        return nil, ("tensor '%s' has the shape %s, which no cuflash tensor can have; the option 'names' chooses others")
          :format(entry.name, handle.shape_text(entry.sizes))
      end
      chosen[#chosen + 1] = entry
      wanted[entry.name] = nil
    end
  end
  local missing = next(wanted)
  if missing then return nil, ("it has no tensor '%s'"):format(missing) end
  return chosen
end

local function read_all(file, size, names, device)
  local entries, metadata, start = read_header(file, size)
  if not entries then return nil, metadata end
  local chosen, message = choose(entries, names)
  if not chosen then return nil, message end
  local tensors = {}
  for _, entry in ipairs(chosen) do
    local tensor = memory.empty("safetensors.load", entry.kind, C.CUFLASH_CPU, entry.sizes)
    if not file:seek("set", start + entry.from) or not files.read(file, tensor.handle.data, entry.to - entry.from) then
      return nil, ("tensor '%s': the file ends too early"):format(entry.name)
    end
    tensors[entry.name] = copies.to("safetensors.load", tensor, entry.kind, device)
    if not rawequal(tensors[entry.name], tensor) then tensor:free() end
  end
  return tensors, metadata
end

--- Reads a safetensors file.
-- @tparam string path
-- @tparam[opt] table options device ("cpu"); names: a list of the tensors to read, without it all
-- @treturn table name -> tensor; or nil and a message that says what is wrong with the file
-- @treturn table the metadata, strings by name
-- @function safetensors.load
function safetensors.load(path, options)
  local name = "safetensors.load"
  checks.path(name, "path", path)
  options = checks.options(name, options, { device = true, names = true })
  local device = checks.device(name, "device", options.device, C.CUFLASH_CPU)
  if options.names ~= nil then
    if type(options.names) ~= "table" then checks.fail(name, "names", "a list of names", options.names) end
    for _, wanted in ipairs(options.names) do checks.string(name, "names", wanted) end
  end
  json() -- its absence is not the file's fault
  local file, size = files.open(path)
  if not file then return nil, size end
  local called, tensors, metadata = pcall(read_all, file, size, options.names, device)
  file:close()
  if not called then error(tensors, 0) end
  if not tensors then return nil, ("%s: %s"):format(path, metadata) end
  return tensors, metadata
end

return safetensors
