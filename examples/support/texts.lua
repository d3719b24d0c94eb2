-- Texts to read: the longest one this repository ships, or a file of the user's.
local texts = {}

local FOLDERS = { "README.md", "docs", "src", "lua", "include" }
local NAMES = { "*.md", "*.txt", "*.c", "*.h", "*.lua" }

local function quote(word)
  return "'" .. word:gsub("'", [['\'']]) .. "'"
end

--- The longest text under the root of the repository; nil where there is none.
function texts.longest(root)
  local places, names = {}, {}
  for i, folder in ipairs(FOLDERS) do places[i] = quote(root .. folder) end
  for i, name in ipairs(NAMES) do names[i] = "-name " .. quote(name) end
  local find = io.popen(("find %s -type f '(' %s ')' -exec wc -c {} + 2>/dev/null"):format(table.concat(places, " "),
    table.concat(names, " -o ")))
  local longest, most = nil, 0
  for line in find:lines() do
    local size, path = line:match "^ *(%d+) (.+)$"
    size = tonumber(size)
    local is_file = size and path:sub(1, #root) == root -- and not the total
    if is_file and (size > most or size == most and path < longest) then longest, most = path, size end
  end
  find:close()
  return longest
end

--- The first bytes of a text file and its size; or nil and what is wrong with it.
function texts.read(path, most)
  local file, message = io.open(path, "rb")
  if not file then return nil, message end
  local text, problem = file:read(most)
  local size = text and file:seek "end"
  file:close()
  if problem then return nil, ("%s: %s"):format(path, problem) end -- a directory
  if not text then return nil, ("%s: it is empty"):format(path) end
  if text:find "%z" then return nil, ("%s: it is not a text, it holds zero bytes"):format(path) end
  return text, math.max(size or 0, #text)
end

--- A piece of text on one line, one column a character.
function texts.on_one_line(text)
  return (text:gsub("[\192-\255][\128-\191]*", "?"):gsub("[\128-\191]", ""):gsub("%c", " "))
end

return texts
