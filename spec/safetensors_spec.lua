local cf = require "spec.support.on_device"
local ffi = require "ffi"
local helper = require "spec.helper"

local ONE, TWO = "\0\0\128\63", "\0\0\0\64" -- 1 and 2 as float32

-- The bytes of a safetensors file.
local function file_of(header, data, length)
  return ffi.string(ffi.new("uint64_t[1]", length or #header), 8) .. header .. data
end

local function load_bytes(bytes, options)
  local path = helper.file_name()
  helper.write(path, bytes)
  return cf.safetensors.load(path, options)
end

local function entry(dtype, shape, from, to)
  return ('{"dtype":"%s","shape":[%s],"data_offsets":[%s,%s]}'):format(dtype, shape, from, to)
end

describe("a safetensors file", function()
  after_each(helper.remove_files)

  it("keeps tensors of every dtype by name, and metadata", function()
    local path = helper.file_name()
    local tensors = { scalar = cf.tensor(3), ["layer.0.weight"] = cf.randn { 4, 5 }, ["odd \"name\" \\ ü"] = cf.randn { 3 } }
    for _, dtype in ipairs { "float32", "float16", "bfloat16", "float64" } do
      tensors[dtype] = cf.randn({ 2, 3, 7 }, { dtype = dtype })
    end
    tensors.view = cf.arange(6):view({ 2, 3 }):transpose(1, 2)
    local metadata = { format = "cuflash", note = "α\n\"β\"" }
    assert.is_true(cf.safetensors.save(path, tensors, { metadata = metadata }))
    local loaded, text = cf.safetensors.load(path)
    assert.are.same(metadata, text)
    for name, tensor in pairs(tensors) do
      assert.are.equal(tensor.dtype, loaded[name].dtype, name)
      assert.is_true(cf.equal(tensor, loaded[name]), name)
      loaded[name] = nil
    end
    assert.is_nil(next(loaded))
    assert.is_nil(getmetatable(metadata))
  end)

  it("may be empty", function()
    local path = helper.file_name()
    assert(cf.safetensors.save(path, {}))
    assert.are.same({}, (cf.safetensors.load(path)))
  end)

  it("is loaded in part by names", function()
    local path = helper.file_name()
    assert(cf.safetensors.save(path, { a = cf.ones { 2 }, b = cf.zeros { 3 } }))
    local loaded = cf.safetensors.load(path, { names = { "b" } })
    assert.tensor(loaded.b, { 0, 0, 0 })
    assert.is_nil(loaded.a)
    local result, message = cf.safetensors.load(path, { names = { "a", "c" } })
    assert.is_nil(result)
    assert.truthy(message:find("it has no tensor 'c'", 1, true))
  end)

  it("has a header of whole 8 bytes, and aligned data", function()
    local path = helper.file_name()
    assert(cf.safetensors.save(path, { a = cf.ones({ 1 }, { dtype = "f16" }), b = cf.ones { 1 }, c = cf.ones({ 1 }, { dtype = "f64" }) }))
    local bytes = helper.read(path)
    local length = bytes:byte(1) + 256 * bytes:byte(2)
    assert.are.equal(0, length % 8)
    assert.are.equal(8 + length + 14, #bytes)
    assert.truthy(bytes:find('"c":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}', 1, true))
    assert.truthy(bytes:find('"a":{"dtype":"F16","shape":[1],"data_offsets":[12,14]}', 1, true))
  end)

  it("is read whatever the order and the spaces of its header", function()
    local loaded = assert(load_bytes(file_of('{ "b" : ' .. entry("F32", "1", 4, 8) .. ' ,\n"a":' .. entry("F32", "1", 0, 4) .. "}   ",
      ONE .. TWO)))
    assert.tensor(loaded.a, { 1 })
    assert.tensor(loaded.b, { 2 })
  end)

  it("may hold types unknown here, as long as they are not asked for", function()
    local bytes = file_of('{"ids":' .. entry("I64", "1", 0, 8) .. ',"x":' .. entry("F32", "1", 8, 12) .. "}", ("\0"):rep(8) .. ONE)
    local result, message = load_bytes(bytes)
    assert.is_nil(result)
    assert.truthy(message:find("tensor 'ids' is of dtype I64", 1, true))
    assert.tensor(load_bytes(bytes, { names = { "x" } }).x, { 1 })
  end)

  local x = '"x":' .. entry("F32", "1", 0, 4)
  local broken = {
    { "nothing", "", "not a safetensors file" },
    { "seven bytes", "1234567", "not a safetensors file" },
    { "a header length beyond the file", file_of("{" .. x .. "}", ONE, 1000), "claims 1000 bytes" },
    { "a huge header length", file_of("{}", "", 2 ^ 62), "claims 4611686018427387904 bytes" },
    { "a negative header length", ("\255"):rep(8) .. "{}", "claims 18446744073709551616 bytes" },
    { "no header", file_of("", ""), "not a JSON object" },
    { "no JSON", file_of("hello", ""), "not a JSON object" },
    { "a JSON list", file_of("[1]", ""), "not a JSON object" },
    { "deeply nested JSON", file_of(("["):rep(300000), ""), "not a JSON object" },
    { "half a JSON object", file_of('{"x":', ""), "not a JSON object" },
    { "two JSON objects", file_of("{}{}", ""), "text after" },
    { "a name twice", file_of("{" .. x .. "," .. x .. "}", ONE), "uses a name twice" },
    { "a name twice, spelt differently", file_of("{" .. x .. ',"\\u0078":' .. entry("F32", "1", 0, 4) .. "}", ONE), "uses a name twice" },
    { "a field twice", file_of('{"x":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', ONE), "uses a name twice" },
    { "an entry that is a number", file_of('{"x":1}', ""), "'x': its entry is not an object" },
    { "no dtype", file_of('{"x":{"shape":[1],"data_offsets":[0,4]}}', ONE), "no dtype" },
    { "no shape", file_of('{"x":{"dtype":"F32","data_offsets":[0,4]}}', ONE), "no shape" },
    { "no offsets", file_of('{"x":{"dtype":"F32","shape":[1]}}', ONE), "data_offsets" },
    { "one offset", file_of('{"x":{"dtype":"F32","shape":[1],"data_offsets":[0]}}', ONE), "data_offsets" },
    { "fractional offsets", file_of('{"x":' .. entry("F32", "1", 0.5, 4.5) .. "}", ONE .. ONE), "data_offsets" },
    { "negative offsets", file_of('{"x":' .. entry("F32", "1", -4, 0) .. "}", ONE), "data_offsets" },
    { "offsets in the wrong order", file_of('{"x":' .. entry("F32", "1", 4, 0) .. "}", ONE), "ends (0) before it begins (4)" },
    { "offsets beyond the file", file_of('{"x":' .. entry("F32", "2", 0, 8) .. "}", ONE), "ends at 8, the file has 4" },
    { "a shape that does not fit its offsets", file_of('{"x":' .. entry("F32", "3", 0, 8) .. "}", ONE .. TWO), "needs 12 bytes" },
    { "a negative size", file_of('{"x":' .. entry("F32", "-1", 0, 4) .. "}", ONE), "its shape holds -1" },
    { "a size that is text", file_of('{"x":' .. entry("F32", '"1"', 0, 4) .. "}", ONE), "its shape holds '1'" },
    { "a shape beyond all numbers", file_of('{"x":' .. entry("F32", "4294967296,4294967296,4294967296", 0, 4) .. "}", ONE), "needs" },
    { "no elements", file_of('{"x":' .. entry("F32", "0", 0, 0) .. "}", ""), "has the shape [0]" },
    { "nine dimensions", file_of('{"x":' .. entry("F32", "1,1,1,1,1,1,1,1,1", 0, 4) .. "}", ONE), "has the shape" },
    { "overlapping tensors", file_of("{" .. x .. ',"y":' .. entry("F32", "1", 2, 6) .. "}", ONE .. TWO), "overlap" },
    { "the same memory twice", file_of("{" .. x .. ',"y":' .. entry("F32", "1", 0, 4) .. "}", ONE), "overlap" },
    { "a hole", file_of("{" .. x .. ',"y":' .. entry("F32", "1", 8, 12) .. "}", ONE:rep(3)), "bytes 4 to 8 belong to no tensor" },
    { "data to spare", file_of("{" .. x .. "}", ONE .. TWO), "bytes 4 to 8 belong to no tensor" },
    { "too little data", file_of("{" .. x .. "}", "ab"), "the file has 2 bytes" },
    { "metadata that is no object", file_of('{"__metadata__":1}', ""), "metadata is not an object" },
    { "metadata that is no text", file_of('{"__metadata__":{"a":1}}', ""), "metadata 'a' is not a string" },
  }
  for _, case in ipairs(broken) do
    it("with " .. case[1] .. " is refused", function()
      local before = helper.live_storages()
      local result, message = load_bytes(case[2])
      assert.is_nil(result)
      assert.truthy(message:find("^/"), message) -- the file's name
      assert.truthy(message:find(case[3], 1, true), message)
      assert.are.equal(before, helper.live_storages())
    end)
  end

  it("that is cut off anywhere is refused", function()
    local path = helper.file_name()
    local whole = file_of("{" .. x .. ',"y":' .. entry("F32", "1", 4, 8) .. "}", ONE .. TWO)
    for length = 0, #whole - 1 do
      helper.write(path, whole:sub(1, length))
      local result, message = cf.safetensors.load(path)
      assert.is_nil(result)
      assert.truthy(message:find(path, 1, true))
    end
  end)

  it("is not written from what is no tensor", function()
    local t = cf.ones { 1 }
    local freed = cf.ones { 1 }
    freed:free()
    assert.raises_at_caller(function() cf.safetensors.save("/tmp/x", t) end, "argument 'tensors'")
    assert.raises_at_caller(function() cf.safetensors.save("/tmp/x", { a = 1 }) end, "argument 'tensors.a'")
    assert.raises_at_caller(function() cf.safetensors.save("/tmp/x", { a = freed }) end, "freed")
    assert.raises_at_caller(function() cf.safetensors.save("/tmp/x", { t }) end, "names as keys, got 1")
    assert.raises_at_caller(function() cf.safetensors.save("/tmp/x", { __metadata__ = t }) end, "__metadata__ is taken")
    assert.raises_at_caller(function() cf.safetensors.save("/tmp/x", { a = t }, { metadata = { a = 1 } }) end, "metadata")
    assert.raises_at_caller(function() cf.safetensors.save("/tmp/x", { a = t }, { meta = {} }) end, "unknown option 'meta'")
  end)

  it("cannot be written just anywhere", function()
    local result, message = cf.safetensors.save("/nowhere/x", { a = cf.ones { 1 } })
    assert.is_nil(result)
    assert.truthy(message:find("/nowhere/x: cannot write it", 1, true))
    result, message = cf.safetensors.save("/dev/full", { a = cf.ones { 10000 } })
    assert.is_nil(result)
    assert.truthy(message:find("No space left", 1, true), message)
  end)

  it("says how to get dkjson where it is missing", function()
    local output = helper.run("luajit -e 'package.path=" .. ("%q"):format(package.path) .. "' -e " .. helper.quote(
      [[ local cf = require "cuflash"; package.preload.dkjson = function() error "none" end
         print(pcall(cf.safetensors.load, "/tmp/x")) ]]))
    assert.truthy(output:find("dkjson is needed; install it with", 1, true), output)
  end)

  it("is what Python reads", function()
    local python, why = helper.python("numpy")
    if not python then pending(why) end
    local path = helper.file_name()
    local t = cf.randn { 2, 3 }
    assert(cf.safetensors.save(path, { t = t, h = t:half() }, { metadata = { k = "v" } }))
    -- the format by hand, as its specification has it
    local output, status = helper.run(([[%s - <<'EOF'
import json, struct, numpy as np
raw = open('%s', 'rb').read()
n = struct.unpack('<Q', raw[:8])[0]
header = json.loads(raw[8:8 + n])
assert header.pop('__metadata__') == {'k': 'v'}
def array(name, dtype):
    e = header[name]
    a, b = e['data_offsets']
    return np.frombuffer(raw[8 + n + a:8 + n + b], dtype).reshape(e['shape'])
assert header['t']['dtype'] == 'F32' and header['h']['dtype'] == 'F16'
assert (array('t', '<f4').astype('<f2') == array('h', '<f2')).all()
print(repr(float(array('t', '<f4')[1, 2])))
EOF]]):format(python, path))
    assert.are.equal(0, status, output)
    assert.are.equal(t[{ 2, 3 }], tonumber(output))
  end)
end)
