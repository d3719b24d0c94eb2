local cf = require "spec.support.on_device"
local helper = require "spec.helper"

local function le(n, bytes)
  local text = ""
  for _ = 1, bytes do
    text = text .. string.char(n % 256)
    n = math.floor(n / 256)
  end
  return text
end

-- The bytes of a .npy file.
local function npy(descr, shape, data, options)
  options = options or {}
  local header = options.header or ("{'descr': '%s', 'fortran_order': %s, 'shape': (%s), }\n"):format(descr,
    options.fortran and "True" or "False", shape)
  local version = options.version or "\1\0"
  local width = version:byte(1) == 1 and 2 or 4
  return (options.magic or "\147NUMPY") .. version .. le(options.length or #header, width) .. header .. data
end

local function load_bytes(bytes, options)
  local path = helper.file_name()
  helper.write(path, bytes)
  return cf.load(path, options)
end

local ONE, TWO = "\0\0\128\63", "\0\0\0\64" -- 1 and 2 as float32

describe("a .npy file", function()
  after_each(helper.remove_files)

  for _, dtype in ipairs { "float32", "float16", "float64" } do
    it("keeps a " .. dtype .. " tensor", function()
      local path = helper.file_name()
      for _, shape in ipairs { { 2, 3, 5 }, { 7 }, { 1, 1 }, {}, { 300, 41 } } do
        local t = cf.randn(shape, { dtype = dtype })
        assert.are.same({ true }, { cf.save(path, t) })
        local u = assert(cf.load(path))
        assert.are.equal(dtype, u.dtype)
        assert.are.same(t:shape(), u:shape())
        assert.is_true(cf.equal(t, u))
      end
    end)
  end

  it("holds views in row-major order", function()
    local path = helper.file_name()
    local t = cf.arange(24):view({ 2, 3, 4 }):transpose(1, 3)[{ {}, { 2, 3 } }]
    assert(cf.save(path, t))
    assert.is_true(cf.equal(t, cf.load(path)))
  end)

  it("is aligned to 64 bytes and written as NumPy does", function()
    local path = helper.file_name()
    assert(cf.save(path, cf.ones { 2 }))
    local bytes = helper.read(path)
    assert.are.equal("\147NUMPY\1\0v\0{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bytes:sub(1, 67))
    assert.are.equal(128 + 8, #bytes)
    assert.are.equal("\n" .. ONE .. ONE, bytes:sub(128))
  end)

  it("is converted while loading", function()
    local path = helper.file_name()
    assert(cf.save(path, cf.arange(3)))
    assert.tensor(cf.load(path, { dtype = "f16", device = "cpu" }), { 1, 2, 3 }, "float16")
  end)

  local readable = {
    { "version 2.0", npy("<f4", "2,", ONE .. TWO, { version = "\2\0" }), { 1, 2 }, "float32" },
    { "version 3.0", npy("<f4", "2,", ONE .. TWO, { version = "\3\0" }), { 1, 2 }, "float32" },
    { "big-endian float32", npy(">f4", "2,", ONE:reverse() .. TWO:reverse()), { 1, 2 }, "float32" },
    { "big-endian float64", npy(">f8", "1,", "\63\240\0\0\0\0\0\0"), { 1 }, "float64" },
    { "Fortran order", npy("<i2", "2, 3", "\1\0\4\0\2\0\5\0\3\0\6\0", { fortran = true }), { { 1, 2, 3 }, { 4, 5, 6 } },
      "float32" },
    { "Fortran order in one dimension", npy("<f4", "2,", ONE .. TWO, { fortran = true }), { 1, 2 }, "float32" },
    { "booleans", npy("|b1", "3,", "\0\1\1"), { 0, 1, 1 }, "float32" },
    { "signed bytes", npy("|i1", "2,", "\255\127"), { -1, 127 }, "float32" },
    { "unsigned bytes", npy("|u1", "2,", "\255\127"), { 255, 127 }, "float32" },
    { "big-endian integers of 16 bits", npy(">i2", "2,", "\255\254\1\0"), { -2, 256 }, "float32" },
    { "integers of 32 bits", npy("<i4", "2,", "\255\255\255\255\1\0\0\1"), { -1, 16777217 }, "float64" },
    { "unsigned integers of 32 bits", npy("<u4", "1,", "\255\255\255\255"), { 4294967295 }, "float64" },
    { "integers of 64 bits", npy("<i8", "2,", ("\255"):rep(8) .. "\0\0\0\0\0\0\32\0"), { -1, 2 ^ 53 }, "float64" },
    { "bfloat16 of ml_dtypes", npy("<V2", "2,", "\128\63\0\64"), { 1, 2 }, "bfloat16" },
    { "a number", npy("<f4", "", ONE), 1, "float32" },
    { "double quotes, other order", npy(nil, nil, ONE .. TWO,
      { header = '{"shape":(1, 2),"fortran_order":False,"descr":"<f4"}' }), { { 1, 2 } }, "float32" },
  }
  for _, case in ipairs(readable) do
    it("can hold " .. case[1], function() assert.tensor(assert(load_bytes(case[2])), case[3], case[4]) end)
  end

  local broken = {
    { "nothing", "", "not a .npy file" },
    { "something else", ("x"):rep(100), "not a .npy file" },
    { "an .npz archive", "PK\3\4" .. ("x"):rep(100), ".npz archives must be unpacked" },
    { "a magic string alone", "\147NUMPY", "not a .npy file" },
    { "no header length", "\147NUMPY\1\0\1", "ends within its header" },
    { "version 4.0", npy("<f4", "2,", ONE .. TWO, { version = "\4\0" }), "version 4.0" },
    { "version 1.7", npy("<f4", "2,", ONE .. TWO, { version = "\1\7" }), "version 1.7" },
    { "a header length beyond the file", npy("<f4", "2,", ONE .. TWO, { length = 60000 }), "claims 60000 bytes" },
    { "a huge header length", npy("<f4", "2,", ONE, { version = "\2\0", length = 4294967295 }), "claims 4294967295 bytes" },
    { "too little data", npy("<f4", "2,", ONE), "describes 8 bytes of data, the file has 4" },
    { "too much data", npy("<f4", "2,", ONE:rep(3)), "describes 8 bytes of data, the file has 12" },
    { "a shape beyond the file", npy("<f4", "1000000000, 1000000000", ONE), "the file has 4" },
    { "a shape beyond all numbers", npy("<f4", ("9999999999, "):rep(8), ONE), "the file has 4" },
    { "no elements", npy("<f4", "2, 0", ""), "holds no elements" },
    { "nine dimensions", npy("<f4", ("1, "):rep(9), ONE), "9 dimensions" },
    { "complex numbers", npy("<c8", "1,", ONE .. ONE), "it holds '<c8'" },
    { "text", npy("<U1", "1,", ONE), "it holds '<U1'" },
    { "objects", npy("|O", "1,", ONE), "it holds '|O'" },
    { "raw memory", npy("|V2", "1,", "ab"), "it holds '|V2'" },
    { "float128", npy("<f16", "1,", ("x"):rep(16)), "it holds '<f16'" },
    { "records", npy(nil, nil, ONE, { header = "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}" }), "records" },
    { "no dictionary", npy(nil, nil, ONE, { header = "['descr', '<f4']" }), "not a dictionary" },
    { "no shape", npy(nil, nil, ONE, { header = "{'descr': '<f4', 'fortran_order': False}" }), "names no shape" },
    { "a negative shape", npy("<f4", "-1,", ONE), "names no shape" },
    { "no order", npy(nil, nil, ONE, { header = "{'descr': '<f4', 'shape': (1,)}" }), "does not say fortran_order" },
    { "no type", npy(nil, nil, ONE, { header = "{'shape': (1,), 'fortran_order': False}" }), "names no descr" },
    { "an integer that float64 cannot hold", npy("<i8", "1,", "\2\0\0\0\0\0\32\0"), "float64 cannot hold exactly" },
  }
  for _, case in ipairs(broken) do
    it("that holds " .. case[1] .. " is refused", function()
      local before = helper.live_storages()
      local result, message = load_bytes(case[2])
      assert.is_nil(result)
      assert.truthy(message:find("^/.-: it"), message)
      assert.truthy(message:find(case[3], 1, true), message)
      assert.are.equal(before, helper.live_storages())
    end)
  end

  it("that is cut off anywhere is refused", function()
    local whole = npy("<f4", "2,", ONE .. TWO)
    local path = helper.file_name()
    for length = 0, #whole - 1 do
      helper.write(path, whole:sub(1, length))
      local result, message = cf.load(path)
      assert.is_nil(result)
      assert.truthy(message:find(path, 1, true))
    end
  end)

  it("that is not there, or no file, is nil and a message", function()
    for path, text in pairs {
      ["/nowhere/x.npy"] = "No such file", ["/"] = "it is a directory", ["/dev/null"] = "it is a device",
    } do
      local result, message = cf.load(path)
      assert.is_nil(result)
      assert.truthy(message:find(text, 1, true), message)
    end
  end)

  it("replaces an old one only when it is complete", function()
    local path = helper.file_name()
    assert(cf.save(path, cf.arange(3)))
    local script = ([[ local cf = require "cuflash"; io.write(tostring(select(2, cf.save(%q, cf.zeros { 100000 })))) ]])
      :format(path)
    -- a limit on the size of files stops the write half way
    local output = helper.run("trap '' XFSZ; ulimit -f 16; luajit -e 'package.path=" .. ("%q"):format(package.path)
      .. "' -e " .. helper.quote(script))
    assert.truthy(output:find(path .. ": cannot write it: File too large", 1, true), output)
    assert.tensor(cf.load(path), { 1, 2, 3 })
    assert.are.equal("", (helper.run("ls " .. path .. ".tmp* 2>/dev/null")))
  end)

  it("is written through a symbolic link", function()
    local path, link = helper.file_name(), helper.file_name()
    helper.run(("ln -sf %s %s"):format(path, link))
    assert(cf.save(link, cf.arange(2)))
    assert.tensor(cf.load(path), { 1, 2 })
    assert.are.equal(path .. "\n", (helper.run("readlink " .. link)))
  end)

  it("cannot be written just anywhere", function()
    for path, text in pairs {
      ["/nowhere/x.npy"] = "/nowhere/x.npy: cannot write it: No such file", ["/tmp"] = "/tmp: it is a directory",
      ["/dev/full"] = "/dev/full: cannot write it: No space left",
    } do
      local result, message = cf.save(path, cf.ones { 2 })
      assert.is_nil(result)
      assert.truthy(message:find(text, 1, true), message)
    end
  end)

  it("cannot hold bfloat16", function()
    assert.raises_at_caller(function() cf.save("/tmp/x.npy", cf.ones({ 1 }, { dtype = "bf16" })) end,
      "save: argument 'tensor': .npy has no bfloat16; convert it with :float(), or use cf.safetensors.save")
  end)

  it("is what NumPy writes and reads", function()
    local python, why = helper.python("numpy")
    if not python then pending(why) end
    local mine, theirs = helper.file_name(), helper.file_name() .. ".npy"
    for _, row in ipairs { { "f4", "float32" }, { "f2", "float16" }, { "f8", "float64" } } do
      local t = cf.randn({ 3, 4, 5 }, { dtype = row[2] })
      assert(cf.save(mine, t))
      local output, status = helper.run(([[%s - <<'EOF'
import numpy as np
a = np.load('%s')
assert a.dtype == np.dtype('<%s') and a.shape == (3, 4, 5) and a.flags.c_contiguous, (a.dtype, a.shape)
np.save('%s', np.asfortranarray(a[:, ::2] * 2))
print(repr(float(a[1, 2, 3])))
EOF]]):format(python, mine, row[1], theirs))
      assert.are.equal(0, status, output)
      assert.are.equal(t[{ 2, 3, 4 }], tonumber(output))
      local back = assert(cf.load(theirs))
      assert.are.equal(row[2], back.dtype)
      assert.are.same({ 3, 2, 5 }, back:shape())
      for i = 1, 2 do assert.is_true(cf.equal(back[{ {}, i }], t[{ {}, 2 * i - 1 }] * 2)) end
    end
    for _, descr in ipairs { "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", ">i4", ">f2" } do
      local output, status = helper.run(([=[%s -c "import numpy as np; np.save('%s', np.array([[0, 1, 1], [1, 0, 1]], '%s'))"]=])
        :format(python, theirs, descr))
      assert.are.equal(0, status, output)
      assert.tensor(assert(cf.load(theirs)), { { 0, 1, 1 }, { 1, 0, 1 } })
    end
    os.remove(theirs)
  end)
end)
