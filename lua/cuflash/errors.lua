--- Errors at the user's line, and suggestions for misspelt names.
-- @module cuflash.errors

local errors = {}

-- Where the module's own files are, as debug.getinfo names them: "@./lua/cuflash/".
local here = debug.getinfo(1, "S").source:match("^@.*[/\\]")

--- Raises at the innermost line that is not the module's own, however deep the call is.
-- @tparam string message a format
-- @param ... what the format takes
-- @function raise
function errors.raise(message, ...)
  if select("#", ...) > 0 then message = message:format(...) end
  local level = 2
  while true do
    local info = debug.getinfo(level, "S")
    if not info then error(message, 0) end
    local ours = info.what == "C" or (here and info.source:sub(1, #here) == here)
    if not ours then error(message, level) end
    level = level + 1
  end
end

-- Edit distance with neighbours swapped counting as one (optimal string alignment).
local function distance(a, b)
  local before, last = nil, {}
  for j = 0, #b do last[j] = j end
  for i = 1, #a do
    local row = { [0] = i }
    for j = 1, #b do
      local same = a:byte(i) == b:byte(j)
      local best = math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (same and 0 or 1))
      if i > 1 and j > 1 and a:byte(i) == b:byte(j - 1) and a:byte(i - 1) == b:byte(j) then
        best = math.min(best, before[j - 2] + 1)
      end
      row[j] = best
    end
    before, last = last, row
  end
  return last[#b]
end

--- The name that was probably meant.
-- @tparam string name what was written
-- @tparam table names what there is, as keys
-- @treturn string " (did you mean 'shape'?)", or "" where nothing is near
-- @function suggest
function errors.suggest(name, names)
  name = tostring(name):lower()
  if #name > 40 then return "" end
  local best, nearest
  for candidate in pairs(names) do
    if type(candidate) == "string" then
      local d = distance(name, candidate:lower())
      local near = d <= math.max(1, math.floor(#candidate / 3))
      if near and (not nearest or d < nearest or (d == nearest and candidate < best)) then
        best, nearest = candidate, d
      end
    end
  end
  return best and (" (did you mean '%s'?)"):format(best) or ""
end

return errors
