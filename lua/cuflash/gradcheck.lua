--- Checks analytic gradients by finite differences.
-- @module cuflash.gradcheck

local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"
local copies = require "cuflash.copies"
local native = require "cuflash.native"

local gradcheck = {}

local NAME = "gradcheck"
local OPTIONS = { eps = true, rtol = true, atol = true, max_elements = true }

local Report = {}
Report.__index = Report

function Report:__tostring()
  local measures = ("largest difference %.3g, relative %.3g"):format(self.max_abs, self.max_rel)
  if self.n_bad == 0 then return ("gradients agree: %d elements checked, %s"):format(self.numel, measures) end
  local worst = self.worst
  return ("gradients differ: %d of %d elements; worst in input %d at {%s}: gradient %.9g, finite differences %.9g; %s")
    :format(self.n_bad, self.numel, worst.input, table.concat(worst.index, ", "), worst.gradient, worst.numeric, measures)
end

local function check_list(argument, value, allow_false)
  if type(value) ~= "table" or not checks.is_sequence(value) or #value == 0 then
    checks.fail(NAME, argument, "a list of tensors", value)
  end
  for i, tensor in ipairs(value) do
    if not (allow_false and tensor == false) then checks.tensor(NAME, ("%s[%d]"):format(argument, i), tensor) end
  end
  return value
end

-- The index (from 1) of the element that is the at-th (from 0) in row-major order.
local function unravel(at, sizes)
  local index = {}
  for dim = #sizes, 1, -1 do
    index[dim] = at % sizes[dim] + 1
    at = math.floor(at / sizes[dim])
  end
  return index
end

local function evaluate(f, inputs)
  local value = f(unpack(inputs))
  if handle.is_tensor(value) then
    local item = value:item()
    value:free()
    value = item
  end
  if type(value) ~= "number" then checks.fail(NAME, "f", "a function that returns a number", value) end
  return value
end

local function new_report()
  return setmetatable({ numel = 0, n_bad = 0, max_abs = 0, max_rel = 0 }, Report)
end

-- Adds one element's comparison; `excess` is how far it lies beyond its tolerance.
local function record(report, options, place, gradient, numeric)
  local difference = math.abs(gradient - numeric)
  local tolerance = options.atol + options.rtol * math.abs(numeric)
  local excess = difference - tolerance
  report.numel = report.numel + 1
  if not (difference <= report.max_abs) then report.max_abs = difference end
  local relative = numeric ~= 0 and difference / math.abs(numeric) or 0
  if not (relative <= report.max_rel) then report.max_rel = relative end
  if not (difference <= tolerance) then report.n_bad = report.n_bad + 1 end
  if not report.worst or not (excess <= report.worst.excess) then
    report.worst = { input = place.input, index = place.index, gradient = gradient, numeric = numeric, excess = excess }
  end
end

--- Checks gradients by central differences in float64: (f(x + eps) - f(x - eps)) / (2 eps), element by element.
-- The inputs are copied to float64 on the CPU and f is called with the copies, so f should compute in float64, as
-- cf.reference.attention does: cf.gradcheck(function(q, k, v) return (cf.reference.attention(q, k, v) * d_o):sum() end,
-- {q, k, v}, {dq, dk, dv}).
-- @tparam function f takes the inputs, returns a number (or a tensor of one element)
-- @tparam {Tensor,...} inputs
-- @tparam {Tensor,...} grads the gradient of f for each input; false for one that is not to be checked
-- @tparam[opt] table options eps (1e-6), rtol (1e-5), atol (1e-7), max_elements: so many of each input, evenly spread
-- @treturn boolean
-- @treturn table report: numel, n_bad, max_abs, max_rel and worst (input, index, gradient, numeric); prints as a sentence
-- @function gradcheck
function gradcheck.gradcheck(f, inputs, grads, options)
  if type(f) ~= "function" then checks.fail(NAME, "f", "a function", f) end
  check_list("inputs", inputs)
  check_list("grads", grads, true)
  options = checks.options(NAME, options, OPTIONS)
  local function positive(argument, default)
    local value = options[argument]
    if value == nil then return default end
    value = checks.finite(NAME, argument, value)
    if value < 0 or (value == 0 and argument == "eps") then checks.fail(NAME, argument, "a positive number", value) end
    return value
  end
  local settings = { eps = positive("eps", 1e-6), rtol = positive("rtol", 1e-5), atol = positive("atol", 1e-7) }
  local most = options.max_elements == nil and math.huge
    or checks.integer(NAME, "max_elements", options.max_elements, 1, 2 ^ 53)
  if #grads ~= #inputs then
    errors.raise("%s: argument 'grads': expected %d, one for each input, got %d", NAME, #inputs, #grads)
  end

  local points = {}
  for i, input in ipairs(inputs) do
    local grad = grads[i]
    if grad and tostring(grad:shape()) ~= tostring(input:shape()) then
      errors.raise("%s: argument 'grads[%d]': expected %s, got %s", NAME, i, tostring(input:shape()),
        tostring(grad:shape()))
    end
    points[i] = copies.copy(NAME, input, dtype.float64, native.C.CUFLASH_CPU)
  end

  local report = new_report()
  for i, point in ipairs(points) do
    if grads[i] then
      local x = point:data()
      local gradient, holder = copies.doubles(NAME, grads[i])
      local sizes, numel = handle.sizes(point), point:numel()
      local step = math.max(1, numel / most)
      for n = 0, math.min(numel, most) - 1 do
        local at = math.floor(n * step)
        local value = x[at]
        x[at] = value + settings.eps
        local above, high = evaluate(f, points), x[at]
        x[at] = value - settings.eps
        local below, low = evaluate(f, points), x[at]
        x[at] = value
        -- divide by the step that was really taken: x + eps is rounded
        record(report, settings, { input = i, index = unravel(at, sizes) }, gradient[at], (above - below) / (high - low))
      end
      if not rawequal(holder, grads[i]) then holder:free() end
    end
  end
  for _, point in ipairs(points) do point:free() end
  return report.n_bad == 0, report
end

return gradcheck
