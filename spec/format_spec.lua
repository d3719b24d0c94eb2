local cf = require "spec.support.on_device"
local helper = require "spec.helper"

describe("a tensor as text", function()
  local cases = {
    { "a matrix", cf.tensor({ { 1, 2.5, -3 }, { 400, 5, 1e-6 } }, { dtype = "f64" }), [[
      1    2.5     -3
    400      5  1e-06
[cf.Tensor float64 2x3 cpu] ]] },
    { "special values, and six digits", cf.tensor { 0 / 0, 1 / 0, -1 / 0, 1 / 3 }, [[
       nan       inf      -inf  0.333333
[cf.Tensor float32 4 cpu] ]] },
    { "a single number", cf.tensor(2.5, { dtype = "bf16" }), [[
  2.5
[cf.Tensor bfloat16 scalar cpu] ]] },
    { "matrices under their index", cf.arange(8):view { 2, 2, 2 }, [[
[1]:
  1  2
  3  4
[2]:
  5  6
  7  8
[cf.Tensor float32 2x2x2 cpu] ]] },
    { "a long row, continued", cf.arange(32), [[
   1   2   3   4   5   6   7   8   9  10  11  12  13  14  15  16  17  18  19  20  21  22  23  24  25  26  27  28  29  30
  31  32
[cf.Tensor float32 32 cpu] ]] },
    { "wide matrices in blocks of columns", cf.arange(64):view { 2, 32 }, [[
columns 1 to 30
   1   2   3   4   5   6   7   8   9  10  11  12  13  14  15  16  17  18  19  20  21  22  23  24  25  26  27  28  29  30
  33  34  35  36  37  38  39  40  41  42  43  44  45  46  47  48  49  50  51  52  53  54  55  56  57  58  59  60  61  62
columns 31 to 32
  31  32
  63  64
[cf.Tensor float32 2x32 cpu] ]] },
    { "eight columns of any width in one block", -cf.full({ 1, 8 }, 1.23456e-5, { dtype = "f64" }), "  "
      .. ("-1.23456e-05  "):rep(7) .. "-1.23456e-05\n[cf.Tensor float64 1x8 cpu]" },
    { "the ends of more than a thousand elements", cf.arange(1001), [[
     1     2     3  ...   999  1000  1001
[cf.Tensor float32 1001 cpu] ]] },
    { "the corners of a large matrix", cf.arange(7000):view({ 1000, 7 }):transpose(1, 2), [[
     1     8    15  ...  6980  6987  6994
     2     9    16  ...  6981  6988  6995
     3    10    17  ...  6982  6989  6996
  ...
     5    12    19  ...  6984  6991  6998
     6    13    20  ...  6985  6992  6999
     7    14    21  ...  6986  6993  7000
[cf.Tensor float32 7x1000 cpu] ]] },
  }
  for _, case in ipairs(cases) do
    it("shows " .. case[1], function()
      assert.are.equal(case[3]:gsub("cpu%] ?$", helper.device_name .. "]"), tostring(case[2]))
    end)
  end

  it("leaves out whole matrices of a large tensor", function()
    local text = tostring(cf.zeros { 9, 200, 2 })
    assert.truthy(text:find("[3]:\n", 1, true))
    assert.truthy(text:find("\n...\n[7]:", 1, true))
    assert.falsy(text:find("[4]:", 1, true))
  end)

  it("stays short for many dimensions", function()
    local _, count = tostring(cf.zeros { 7, 7, 7, 7, 7, 7 }):gsub("\n", "")
    assert.is_true(count < 200)
  end)

  it("shows all of a thousand elements", function()
    local text = tostring(cf.arange(1000):view { 100, 10 })
    assert.falsy(text:find("...", 1, true))
    assert.truthy(text:find(" 555 ", 1, true))
  end)

  it("needs little memory for a large tensor", function()
    local t = cf.zeros { 1024, 1024 }
    collectgarbage()
    cf.memory_reset_peak()
    local before = cf.memory_stats().live_bytes
    tostring(t)
    assert.is_true(cf.memory_stats().peak_bytes - before < 10000)
  end)
end)
