--- The Lua side of a tensor: a struct around one cuflash_tensor, so that the C fields do not hide the methods.
-- @module cuflash.handle

local ffi = require "ffi"
require "cuflash.library"

local handle = {}

-- Whoever makes one owns a reference to its storage; cuflash.tensor gives the type its metatable, whose __gc
-- gives the reference back.
-- LuaJIT's own messages show its name. A type keeps its metatable, so a module loaded anew declares another.
local name, serial = "struct cf_tensor", 1
while pcall(ffi.typeof, name) do
  serial = serial + 1
  name = "struct cf_tensor_" .. serial
end
ffi.cdef(name .. " { cuflash_tensor handle; };")
handle.type = ffi.typeof(name)

local tensor_type = handle.type

--- Whether a value is a tensor, freed or not.
-- @param value
-- @treturn boolean
-- @function is_tensor
function handle.is_tensor(value)
  return ffi.istype(tensor_type, value)
end

--- Whether a tensor was freed.
-- @function is_freed
-- @local
function handle.is_freed(tensor)
  return tensor.handle.data == nil
end

-- Lua memory under a tensor made by cf.from_pointer, which must live as long as the tensor and its views.
local anchors = setmetatable({}, { __mode = "k" })

--- Keeps a Lua value alive for as long as a tensor is.
-- @function anchor
-- @local
function handle.anchor(tensor, value)
  anchors[tensor] = value
end

--- Lets a view keep alive what its source keeps alive.
-- @function share_anchor
-- @local
function handle.share_anchor(view, source)
  if source.handle.storage == nil then anchors[view] = anchors[source] end
end

--- The sizes of a tensor as a Lua table.
-- @function sizes
-- @local
function handle.sizes(tensor)
  local h, sizes = tensor.handle, {}
  for i = 1, h.ndim do sizes[i] = tonumber(h.shape[i - 1]) end
  return sizes
end

--- Sizes in words: "[2 x 8 x 128 x 64]".
-- @function shape_text
-- @local
function handle.shape_text(sizes)
  local text = {}
  for i = 1, #sizes do text[i] = tostring(sizes[i]) end
  return "[" .. table.concat(text, " x ") .. "]"
end

return handle
