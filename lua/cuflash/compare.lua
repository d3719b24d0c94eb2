--- Comparing tensors.
-- @module cuflash.compare

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local attention = require "cuflash.attention"

local compare = {}

local C = native.C

local Report = {}
Report.__index = Report

function Report:__tostring()
  local measures = ("relative error %.3g (in norm), largest difference %.3g"):format(self.rel_norm, self.max_abs)
  if self.n_bad == 0 then return ("close: %d elements, %s"):format(self.numel, measures) end
  return ("not close: %d of %d elements differ by more than %.3g + %.3g * |expected|; worst at {%s}: got %.9g, expected %.9g; %s")
    :format(self.n_bad, self.numel, self.atol, self.rtol, table.concat(self.worst_index, ", "), self.worst_actual,
      self.worst_expected, measures)
end

local function run(name, actual, expected, rtol, atol, equal_nan)
  local c = ffi.new "cuflash_close_report"
  native.call(name, C.cuflash_tensor_compare, actual, expected, rtol, atol, equal_nan, c)
  return c
end

local function same_shape(a, b)
  return tostring(a:shape()) == tostring(b:shape())
end

-- What rounding alone may do to a result of each dtype, as PyTorch's assert_close has it.
local ROUNDING = {
  float64 = { rtol = 1e-7, atol = 1e-7 }, float32 = { rtol = 1.3e-6, atol = 1e-5 },
  float16 = { rtol = 1e-3, atol = 1e-5 }, bfloat16 = { rtol = 1.6e-2, atol = 1e-5 },
}

-- The looser of the two tensors' dtypes decides.
local function rounding(a, b)
  local left, right = ROUNDING[a.dtype], ROUNDING[b.dtype]
  return left.rtol + left.atol > right.rtol + right.atol and left or right
end

local function tolerance(name, argument, value, default)
  if value == nil then return default end
  value = checks.finite(name, argument, value)
  if value < 0 then checks.fail(name, argument, "a number of at least 0", value) end
  return value
end

--- Whether two tensors of one shape are close: |actual - expected| <= atol + rtol * |expected| everywhere. Equal
-- infinities are close; dtypes and devices may differ.
-- @tparam Tensor actual
-- @tparam Tensor expected
-- @tparam[opt] table options rtol and atol (by the less precise dtype: 1e-7 and 1e-7 for float64, 1.3e-6 and 1e-5 for
--   float32, 1e-3 and 1e-5 for float16, 1.6e-2 and 1e-5 for bfloat16), equal_nan (false)
-- @treturn boolean
-- @treturn table report: numel, n_bad, max_abs, max_rel, rel_norm, worst_index, worst_actual, worst_expected, rtol, atol;
--   prints as a sentence
-- @function all_close
function compare.all_close(actual, expected, options)
  local name = "all_close"
  checks.tensor(name, "actual", actual)
  checks.tensor(name, "expected", expected)
  -- all_close(o, cf.reference.attention(...)) brings the context of that call along
  if attention.is_context(options) then options = nil end
  options = checks.options(name, options, { rtol = true, atol = true, equal_nan = true })
  local default = rounding(actual, expected)
  local rtol = tolerance(name, "rtol", options.rtol, default.rtol)
  local atol = tolerance(name, "atol", options.atol, default.atol)
  local equal_nan = checks.boolean(name, "equal_nan", options.equal_nan) or false
  if not same_shape(actual, expected) then
    errors.raise("%s: argument 'expected': expected the shape of 'actual', %s, got %s", name,
      handle.shape_text(handle.sizes(actual)), handle.shape_text(handle.sizes(expected)))
  end
  local c = run(name, actual, expected, rtol, atol, equal_nan)
  local report = { rtol = rtol, atol = atol, worst_index = {} }
  for _, field in ipairs { "numel", "n_bad", "max_abs", "max_rel", "rel_norm", "worst_actual", "worst_expected" } do
    report[field] = tonumber(c[field])
  end
  for i = 1, actual:dim() do report.worst_index[i] = tonumber(c.worst_index[i - 1]) + 1 end
  return report.n_bad == 0, setmetatable(report, Report)
end

--- Whether two tensors have the same shape and equal values; dtypes and devices may differ. NaN equals nothing.
-- @tparam Tensor a
-- @tparam Tensor b
-- @treturn boolean
-- @function equal
function compare.equal(a, b)
  checks.tensor("equal", "a", a)
  checks.tensor("equal", "b", b)
  if not same_shape(a, b) then return false end
  return run("equal", a, b, 0, 0, false).n_bad == 0
end

return compare
