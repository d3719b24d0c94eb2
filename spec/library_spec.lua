local cf = require "cuflash"
local helper = require "spec.helper"

local luajit = helper.luajit
local lua = package.searchpath("cuflash", package.path):match("^(.*)cuflash/init.lua$")
local lib = package.loaded["cuflash.library"].path

describe("the module", function()
  after_each(helper.remove_files)

  it("is loaded in plain luajit, and sets no global", function()
    local output, status = luajit([[
      local before = {}
      for name in pairs(_G) do before[name] = true end
      local cf = require "cuflash"
      for name in pairs(_G) do assert(before[name], name) end
      print(cf.version, cf.zeros({2}):sum())]], "CUFLASH_LIB=" .. helper.quote(lib))
    assert.are.equal(cf.version .. "\t0\n", output)
    assert.are.equal(0, status)
  end)

  it("tells its version and its library", function()
    assert.truthy(cf.version:find("^%d+%.%d+%.%d+$"))
    assert.are.equal(("cuflash %s (%s)"):format(cf.version, lib), tostring(cf))
    assert.truthy(({ baseline = 1, avx2 = 1, avx512 = 1, avx512bf16 = 1, amx = 1 })[cf.cpu.isa()])
    local threads = cf.num_threads()
    assert.are.equal(1, cf.num_threads(1))
    assert.are.equal(1, cf.num_threads())
    assert.are.equal(threads, cf.num_threads(threads))
    cf.synchronize()
  end)

  it("finds a library named by CUFLASH_LIB only", function()
    local output, status = luajit('require "cuflash"', "CUFLASH_LIB=/nowhere/libcuflash.so")
    assert.are_not.equal(0, status)
    assert.truthy(output:find("cannot load the native library", 1, true))
    assert.truthy(output:find("/nowhere/libcuflash.so", 1, true))
    assert.truthy(output:find("script/build", 1, true))
    assert.falsy(output:find("build/release", 1, true))
  end)

  it("finds a library on package.cpath", function()
    local directory = helper.file_name() .. ".d"
    helper.run(("mkdir %s && cp %s %s/libcuflash.so"):format(directory, helper.quote(lib), directory))
    local output = luajit('print(require "cuflash")', ("CUFLASH_LIB= LUA_CPATH='%s/?.so'"):format(directory))
    helper.run("rm -r " .. directory)
    assert.are.equal(("cuflash %s (%s/libcuflash.so)\n"):format(cf.version, directory), output)
  end)

  it("finds a library of the installation it is part of, and lists every place tried where there is none", function()
    local prefix = helper.file_name() .. ".d"
    helper.run(("mkdir -p %s/share/lua/5.1 %s/lib && cp -r %scuflash %s/share/lua/5.1/"):format(prefix, prefix, lua, prefix))
    local command = ("CUFLASH_LIB= LUA_CPATH='/nowhere/?.so' LUA_PATH='%s/share/lua/5.1/?.lua;%s/share/lua/5.1/?/init.lua' luajit -e %s")
      :format(prefix, prefix, helper.quote('print(require("cuflash").library_path)'))
    local output, status = helper.run(command)
    assert.are_not.equal(0, status)
    for _, place in ipairs { "/nowhere/cuflash.so: no such file", "/nowhere/libcuflash.so: no such file", "build/release/libcuflash.so",
      "/lib/libcuflash.so: no such file" } do
      assert.truthy(output:find(place, 1, true), place .. " is not in " .. output)
    end
    helper.run(("cp %s %s/lib/libcuflash.so"):format(helper.quote(lib), prefix))
    output, status = helper.run(command)
    helper.run("rm -r " .. prefix)
    assert.are.equal(0, status, output)
    assert.truthy(output:find("/lib/libcuflash.so\n", 1, true))
  end)

  it("refuses a library that is none of cuflash", function()
    local output, status = luajit('require "cuflash"', "CUFLASH_LIB=libm.so.6")
    assert.are_not.equal(0, status)
    assert.truthy(output:find("is not a cuflash library", 1, true), output)
  end)

  it("can be loaded twice in one process", function()
    local output, status = luajit([[
      local first = require "cuflash"
      for name in pairs(package.loaded) do
        if name:find "^cuflash" then package.loaded[name] = nil end
      end
      local second = require "cuflash"
      assert(first ~= second)
      print(second.zeros({2}):sum(), first.ones({2}):sum())]], "CUFLASH_LIB=" .. helper.quote(lib))
    assert.are.equal("0\t2\n", output)
    assert.are.equal(0, status)
  end)

  it("leaves the process in order at exit", function()
    local output, status = luajit([[
      cf = require "cuflash"
      q = cf.randn {1, 2, 64, 32}
      o, ctx = cf.attention(q, q, q)
      os.exit(true, true)]], "CUFLASH_LIB=" .. helper.quote(lib))
    assert.are.equal("", output)
    assert.are.equal(0, status)
  end)
end)
