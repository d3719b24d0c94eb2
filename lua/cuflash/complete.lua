--- Completion in the REPL: keywords, globals, fields of tables, methods of tensors.
-- @module cuflash.complete

local handle = require "cuflash.handle"
local tensor = require "cuflash.tensor"
local help = require "cuflash.help"

local complete = {}

local KEYWORDS = {}
for word in ([[and break do else elseif end false for function goto if in local nil not or repeat return then true
  until while]]):gmatch("%a+") do KEYWORDS[word] = true end

-- The names a value offers after a dot or a colon. Nothing of the user's is called.
local function members(value, separator)
  local names = {}
  if type(value) == "table" then
    for key, member in pairs(value) do
      if type(key) == "string" and (separator == "." or type(member) == "function") then names[key] = true end
    end
    local metatable = getmetatable(value)
    local inherited = type(metatable) == "table" and rawget(metatable, "__index")
    if type(inherited) == "table" then
      for key, member in pairs(inherited) do
        if type(key) == "string" and not key:find("^__") and type(member) == "function" then names[key] = true end
      end
    end
  elseif type(value) == "string" and separator == ":" then
    for key in pairs(string) do names[key] = true end
  elseif handle.is_tensor(value) then
    for key in pairs(tensor.methods) do names[key] = true end
    if separator == "." then
      for key in pairs(tensor.properties) do names[key] = true end
    end
  end
  return names
end

-- The value of a path of names ("cf.cuda"), or nil.
local function resolve(path, environment)
  local value = environment
  for name in path:gmatch("[%a_][%w_]*") do
    if type(value) ~= "table" then return nil end
    value = rawget(value, name)
    if value == nil then return nil end
  end
  return value
end

local function sorted(names, prefix, before)
  local list = {}
  for name in pairs(names) do
    if name:sub(1, #prefix) == prefix and name:find("^[%a_][%w_]*$") then list[#list + 1] = before .. name end
  end
  table.sort(list)
  return list
end

--- The words that may stand where a word of a line is being typed.
-- @tparam string line the line so far
-- @tparam string word the end of it that is to be completed, such as "cf.at"
-- @tparam table environment the globals
-- @treturn {string,...}
-- @function words
function complete.words(line, word, environment)
  if line:find("^%s*%?") then
    local list, owner = {}, word:match("^cf%.") or ""
    for _, name in ipairs(help.names()) do
      name = owner .. name:gsub(":", ".")
      if name:sub(1, #word) == word then list[#list + 1] = name end
    end
    return list
  end
  local path, separator, prefix = word:match("^(.*)([.:])([%w_]*)$")
  if path then
    if not path:find("^[%a_][%w_.]*$") then return {} end
    return sorted(members(resolve(path, environment), separator), prefix, path .. separator)
  end
  local names = {}
  for name in pairs(environment) do if type(name) == "string" then names[name] = true end end
  for name in pairs(KEYWORDS) do names[name] = true end
  return sorted(names, word, "")
end

return complete
