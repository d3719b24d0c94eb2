--- Views: tensors that share the memory of another. Dimensions and indices count from 1, or from -1 at the end.
-- @module cuflash.views

local native = require "cuflash.native"
local checks = require "cuflash.checks"
local errors = require "cuflash.errors"
local handle = require "cuflash.handle"
local memory = require "cuflash.memory"
local copies = require "cuflash.copies"

local views = {}

local C = native.C
local INVALID_ARGUMENT = tonumber(C.CUFLASH_INVALID_ARGUMENT)
local sizes_of, shape_text = handle.sizes, handle.shape_text

-- Makes a view with one of C's functions; the arguments are those after `src`.
local function make(name, f, source, ...)
  local out = handle.type()
  native.call(name, f, out, source, ...)
  handle.share_anchor(out, source)
  return out
end

--- Another handle on the same memory, which keeps it alive after the first is freed.
-- @treturn Tensor
-- @function tensor:alias
function views:alias()
  checks.tensor("alias", "self", self)
  return make("alias", C.cuflash_tensor_alias, self)
end

--- Elements start ... start + length - 1 of a dimension. A view.
-- @tparam number dim
-- @tparam number start
-- @tparam number length
-- @treturn Tensor
-- @function tensor:narrow
function views:narrow(dim, start, length)
  local h = checks.tensor("narrow", "self", self).handle
  dim = checks.dim("narrow", "dim", dim, h.ndim)
  local size = tonumber(h.shape[dim])
  start = checks.index("narrow", "start", start, size)
  length = checks.integer("narrow", "length", length, 1, size - start)
  return make("narrow", C.cuflash_tensor_narrow, self, dim, start, length)
end

--- One index of a dimension, which is dropped. A view.
-- @tparam number dim
-- @tparam number index
-- @treturn Tensor
-- @function tensor:select
function views:select(dim, index)
  local h = checks.tensor("select", "self", self).handle
  dim = checks.dim("select", "dim", dim, h.ndim)
  index = checks.index("select", "index", index, tonumber(h.shape[dim]))
  return make("select", C.cuflash_tensor_select, self, dim, index)
end

--- Two dimensions swapped. A view: t:transpose(2, 3) makes [batch x seq x heads x dim] memory the
-- [batch x heads x seq x dim] that attention takes.
-- @tparam number dim1
-- @tparam number dim2
-- @treturn Tensor
-- @function tensor:transpose
function views:transpose(dim1, dim2)
  local h = checks.tensor("transpose", "self", self).handle
  dim1 = checks.dim("transpose", "dim1", dim1, h.ndim)
  dim2 = checks.dim("transpose", "dim2", dim2, h.ndim)
  return make("transpose", C.cuflash_tensor_transpose, self, dim1, dim2)
end

-- The sizes of a view with -1 replaced by what is left.
local function resolve(name, tensor, shape)
  local sizes = checks.shape(name, "shape", shape, -1)
  local count, open = 1, nil
  for i, n in ipairs(sizes) do
    if n == -1 then
      if open then errors.raise("%s: argument 'shape': only one size may be -1, got %s", name, shape_text(sizes)) end
      open = i
    else
      count = count * n
    end
  end
  local numel = tonumber(C.cuflash_tensor_numel(tensor.handle))
  local fits = open and numel % count == 0 or numel == count
  if not fits then
    errors.raise("%s: argument 'shape': %s does not hold the %d elements of %s", name, shape_text(sizes), numel,
      shape_text(sizes_of(tensor)))
  end
  if open then sizes[open] = numel / count end
  return sizes
end

--- The same elements in another shape, without a copy; raises where the strides do not allow that (reshape copies then).
-- @tparam {number,...} shape one size may be -1: whatever is left
-- @treturn Tensor
-- @function tensor:view
function views:view(shape)
  checks.tensor("view", "self", self)
  local sizes = resolve("view", self, shape)
  local out = handle.type()
  local status = native.try(C.cuflash_tensor_view, out, self, #sizes, memory.c_shape(sizes))
  if status == INVALID_ARGUMENT then
    errors.raise("view: the strides of the tensor %s do not allow the shape %s without a copy; use :reshape",
      shape_text(sizes_of(self)), shape_text(sizes))
  elseif status ~= 0 then
    native.fail("view")
  end
  handle.share_anchor(out, self)
  return out
end

--- The same elements in another shape: a view where the strides allow it, otherwise a copy.
-- @tparam {number,...} shape one size may be -1: whatever is left
-- @treturn Tensor
-- @function tensor:reshape
function views:reshape(shape)
  checks.tensor("reshape", "self", self)
  local sizes = resolve("reshape", self, shape)
  local out = handle.type()
  local status = native.try(C.cuflash_tensor_view, out, self, #sizes, memory.c_shape(sizes))
  if status == INVALID_ARGUMENT then
    local copy = copies.copy("reshape", self)
    native.call("reshape", C.cuflash_tensor_view, out, copy, #sizes, memory.c_shape(sizes))
    copy:free()
  elseif status ~= 0 then
    native.fail("reshape")
  end
  handle.share_anchor(out, self)
  return out
end

--- Dimensions of size 1, and new leading ones, repeated without a copy. The result can be read but not written.
-- @tparam {number,...} shape -1 keeps a size as it is
-- @treturn Tensor
-- @function tensor:expand
function views:expand(shape)
  checks.tensor("expand", "self", self)
  local sizes, own = checks.shape("expand", "shape", shape, -1), sizes_of(self)
  local added = #sizes - #own
  local fits = added >= 0
  for i = 1, fits and #sizes or 0 do
    local from = own[i - added]
    if sizes[i] == -1 then sizes[i] = from or -1 end
    fits = fits and (from == nil or from == 1 or from == sizes[i]) and sizes[i] > 0
  end
  if not fits then
    errors.raise("expand: argument 'shape': %s does not expand to %s", shape_text(own), shape_text(sizes))
  end
  return make("expand", C.cuflash_tensor_expand, self, #sizes, memory.c_shape(sizes))
end

return views
