--- Tensors as text: the values in aligned columns, then a line with the type, the shape and the device.
-- @module cuflash.format

local native = require "cuflash.native"
local handle = require "cuflash.handle"
local dtype = require "cuflash.dtype"
local memory = require "cuflash.memory"
local copies = require "cuflash.copies"

local format = {}

local C = native.C

local ALL = 1000   -- up to so many elements every value is shown,
local EDGE = 3     -- beyond that so many at either end of a dimension
local CROWD = 2000 -- fewer, down to one, where even those would be more than this
local WIDTH = 120  -- of a line: eight columns of any width fit
local GAP = "..."  -- what stands for values left out

-- Which indices of each dimension to show (counted from 0); `false` stands for those left out.
local function shown_indices(sizes, numel)
  local edge = numel > ALL and EDGE or math.huge
  local function count()
    local n = 1
    for _, size in ipairs(sizes) do n = n * math.min(size, 2 * edge) end
    return n
  end
  while edge ~= math.huge and edge > 1 and count() > CROWD do edge = edge - 1 end
  local shown = {}
  for dim, size in ipairs(sizes) do
    local list = {}
    if size > 2 * edge then
      for i = 0, edge - 1 do list[#list + 1] = i end
      list[#list + 1] = false
      for i = size - edge, size - 1 do list[#list + 1] = i end
    else
      for i = 0, size - 1 do list[i + 1] = i end
    end
    shown[dim] = list
  end
  return shown
end

-- The values to show as a small float64 tensor on the CPU: of a large tensor only its corners are copied.
local function gather(tensor, shown)
  local ndim, kept, blocks = #shown, {}, { {} }
  for dim = 1, ndim do
    local list, halves = shown[dim], {}
    local cut
    for i, index in ipairs(list) do if not index then cut = i end end
    kept[dim] = cut and #list - 1 or #list
    if cut then
      halves[1] = { from = 0, to = 0, length = cut - 1 }
      halves[2] = { from = list[cut + 1], to = cut - 1, length = #list - cut }
    else
      halves[1] = { from = 0, to = 0, length = #list }
    end
    local longer = {}
    for _, block in ipairs(blocks) do
      for _, half in ipairs(halves) do
        local copy = { unpack(block) }
        copy[dim] = half
        longer[#longer + 1] = copy
      end
    end
    blocks = longer
  end
  local values = memory.empty("tostring", dtype.float64, C.CUFLASH_CPU, kept)
  local from, to = handle.type(), handle.type()
  for _, block in ipairs(blocks) do
    native.call("tostring", C.cuflash_tensor_alias, from, tensor)
    native.call("tostring", C.cuflash_tensor_alias, to, values)
    for dim, half in ipairs(block) do
      native.call("tostring", C.cuflash_tensor_narrow, from, from, dim - 1, half.from, half.length)
      native.call("tostring", C.cuflash_tensor_narrow, to, to, dim - 1, half.to, half.length)
    end
    native.call("tostring", C.cuflash_tensor_copy, to, from)
    C.cuflash_tensor_release(from.handle)
    C.cuflash_tensor_release(to.handle)
  end
  return values
end

local function number_text(x)
  if x ~= x then return "nan" end
  return ("%.6g"):format(x)
end

-- Rows of cells as lines, cut into blocks of columns where they are too wide.
local function add_table(lines, rows, width, labelled)
  local columns = 0
  for _, row in ipairs(rows) do columns = math.max(columns, #row) end
  local per_block = math.max(1, math.floor((WIDTH + 1) / (width + 2)))
  for first = 1, columns, per_block do
    local last = math.min(first + per_block - 1, columns)
    if labelled and columns > per_block then
      lines[#lines + 1] = first < last and ("columns %d to %d"):format(first, last) or ("column %d"):format(first)
    end
    for _, row in ipairs(rows) do
      if row.gap then
        lines[#lines + 1] = "  " .. GAP
      else
        local cells = {}
        for i = first, last do
          local cell = row[i]
          cells[#cells + 1] = cell == GAP and cell or (" "):rep(width - #cell) .. cell
        end
        lines[#lines + 1] = "  " .. table.concat(cells, "  ")
      end
    end
  end
end

local function values_text(tensor, sizes, numel)
  local shown = shown_indices(sizes, numel)
  local small = gather(tensor, shown)
  local values, holder = copies.doubles("tostring", small)
  local lines, width, at = {}, 0, 0
  local texts = {}
  for i = 0, tonumber(C.cuflash_tensor_numel(small.handle)) - 1 do
    texts[i] = number_text(values[i])
    width = math.max(width, #texts[i])
  end
  if not rawequal(holder, small) then holder:free() end
  small:free()
  local ndim = #sizes

  local function row()
    local cells = {}
    for _, index in ipairs(shown[ndim]) do
      if index then
        cells[#cells + 1] = texts[at]
        at = at + 1
      else
        cells[#cells + 1] = GAP
      end
    end
    return cells
  end

  local function matrix()
    local rows = {}
    for _, index in ipairs(shown[ndim - 1]) do rows[#rows + 1] = index and row() or { gap = true } end
    add_table(lines, rows, width, true)
  end

  local function visit(dim, place)
    if dim == ndim - 1 then
      if place ~= "" then lines[#lines + 1] = place .. ":" end
      return matrix()
    end
    for _, index in ipairs(shown[dim]) do
      if index then
        visit(dim + 1, place .. "[" .. index + 1 .. "]")
      else
        lines[#lines + 1] = GAP
      end
    end
  end

  if ndim == 0 then
    lines[1] = "  " .. texts[0]
  elseif ndim == 1 then
    add_table(lines, { row() }, width, false)
  else
    visit(1, "")
  end
  return table.concat(lines, "\n")
end

--- The type, shape and device in one line: [cf.Tensor float16 2x8x128x64 cuda:0].
-- @function summary
function format.summary(tensor)
  if handle.is_freed(tensor) then return "[cf.Tensor freed]" end
  local sizes = handle.sizes(tensor)
  local shape = #sizes == 0 and "scalar" or table.concat(sizes, "x")
  return ("[cf.Tensor %s %s %s]"):format(dtype.of(tensor).name, shape, dtype.device_name(tensor.handle.device))
end

--- A tensor as text; of more than 1000 elements only the ends of each dimension.
-- @function tensor
function format.tensor(tensor)
  if handle.is_freed(tensor) then return format.summary(tensor) end
  local numel = tonumber(C.cuflash_tensor_numel(tensor.handle))
  return values_text(tensor, handle.sizes(tensor), numel) .. "\n" .. format.summary(tensor)
end

return format
