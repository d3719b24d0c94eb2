local ffi = require "ffi"
local helper = require "spec.helper"
local library = require "cuflash.library"

describe("the FFI's view of the C types", function()
  it("is that of the C compiler", function()
    local program = os.getenv("CUFLASH_ABI_LAYOUT")
    if not program or program == "" then pending("CUFLASH_ABI_LAYOUT does not name the program abi_layout") end
    local output, status = helper.run(helper.quote(program))
    assert.are.equal(0, status, output)
    local structs, fields = 0, 0
    for struct, field, offset, size in output:gmatch("(%S+) (%S+) (%S+) (%S+)\n") do
      if field == "-" then
        assert.are.equal(tonumber(size), ffi.sizeof(struct), struct)
        structs = structs + 1
      else
        local place = struct .. "." .. field
        local at = ffi.offsetof(struct, field)
        assert.are.equal(tonumber(offset), at, place)
        -- a field that is read as cdata (an array, a 64-bit integer) tells its size; of the others the offsets must do
        local value = ffi.new(struct)[field]
        if type(value) == "cdata" and not tostring(value):find("*", 1, true) then
          assert.are.equal(tonumber(size), ffi.sizeof(value), place)
        end
        fields = fields + 1
      end
    end
    assert.is_true(structs >= 5 and fields >= 30, output)
  end)

  it("is complete: every function of the header can be called", function()
    local text = ffi.string(library.C.cuflash_ffi_cdef())
    local count = 0
    for name in text:gmatch("(cuflash_[%w_]+)%(") do
      assert.is_true(pcall(function() return library.C[name] end), name)
      count = count + 1
    end
    assert.is_true(count >= 40)
  end)

  it("has the constants", function()
    assert.are.equal(1, library.C.CUFLASH_ABI_VERSION)
    assert.are.equal(-1, library.C.CUFLASH_CPU)
    assert.are.equal(8, library.C.CUFLASH_MAX_DIMS)
  end)
end)
