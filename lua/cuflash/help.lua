--- Help in the REPL, taken from the comments of the module's own files.
-- @module cuflash.help

local errors = require "cuflash.errors"

local help = {}

local here = debug.getinfo(1, "S").source:match("^@(.*[/\\])") or "./"

local WIDTH = 96

-- Where public functions are documented, with the heading their names are listed under.
local SOURCES = {
  { "create", "new tensors" }, { "random", "new tensors" }, { "borrow", "new tensors" },
  { "tensor", "tensors" }, { "views", "tensors" }, { "copies", "tensors" }, { "arithmetic", "tensors" },
  { "index", "tensors" }, { "handle", "tensors" },
  { "attention", "attention" }, { "reference", "attention" },
  { "compare", "checks" }, { "gradcheck", "checks" },
  { "npy", "files" }, { "safetensors", "files" },
  { "machine", "machine" }, { "memory", "machine" },
  { "cuda", "CUDA" }, { "stream", "CUDA" },
}
local HEADINGS = { "attention", "new tensors", "tensors", "checks", "files", "machine", "CUDA" }

-- Adds a line of a comment to the block being read.
local function take(block, text)
  local tag, rest = text:match("^@(%a+%b[])%s*(.*)$")
  if not tag then tag, rest = text:match("^@(%a+)%s*(.*)$") end
  if tag then
    block.tags[#block.tags + 1] = { name = tag, text = rest }
  elseif #block.tags > 0 then
    local last = block.tags[#block.tags]
    last.text = last.text .. " " .. text:gsub("^%s+", "")
  else
    block.text[#block.text + 1] = text
  end
end

-- The comment blocks of a file that begin with three dashes.
local function blocks_of(path)
  local blocks, block = {}, nil
  local file = io.open(path)
  if not file then return blocks end
  for line in file:lines() do
    local opening, more = line:match("^%-%-%- ?(.*)$"), line:match("^%-%- ?(.*)$")
    if opening then
      block = { text = {}, tags = {} }
      blocks[#blocks + 1] = block
      take(block, opening)
    elseif more and block then
      take(block, more)
    else
      block = nil
    end
  end
  file:close()
  return blocks
end

local function wrap(text, indent, first)
  local lines, line = {}, first or indent
  local empty = true
  for word in text:gmatch("%S+") do
    if not empty and #line + 1 + #word > WIDTH then
      lines[#lines + 1] = line
      line, empty = indent, true
    end
    line = empty and line .. word or line .. " " .. word
    empty = false
  end
  lines[#lines + 1] = line
  return table.concat(lines, "\n")
end

-- A block as a topic: its name, signature and text; nil for one that documents no public function.
local function topic_of(block)
  local name, parameters, results = nil, {}, {}
  for _, tag in ipairs(block.tags) do
    if tag.name == "local" then return nil end
    if tag.name == "function" then name = tag.text:match("%S+") end
    if tag.name == "param" then
      parameters[#parameters + 1] = { name = tag.text:match("%S+"), text = "", kind = "any value" }
    elseif tag.name:find("^tparam") then
      local rest = tag.text:gsub("^%b{}%s*", "table ")
      local _, parameter, what = rest:match("^(%S+)%s+(%S+)%s*(.*)$")
      parameters[#parameters + 1] = { name = parameter, text = what, optional = tag.name:find("%[opt") ~= nil,
        default = tag.name:match("%[opt=(.-)%]"), kind = tag.text:match("^(%b{})") or tag.text:match("^(%S+)") }
    elseif tag.name:find("^treturn") then
      results[#results + 1] = (tag.text:gsub("^{.-}%s?", "table ", 1))
    end
  end
  return name and { name = name, parameters = parameters, results = results, text = table.concat(block.text, " ") }
end

local function signature(topic)
  local text, open = "", 0
  for i, parameter in ipairs(topic.parameters) do
    if parameter.optional then
      text, open = text .. (i > 1 and "[, " or "["), open + 1
    elseif i > 1 then
      text = text .. ", "
    end
    text = text .. parameter.name
  end
  local owner = topic.name:match("^(%a+):")
  local name = owner == "tensor" and topic.name:gsub("^tensor:", "t:") or owner and topic.name or "cf." .. topic.name
  return name .. "(" .. text .. ("]"):rep(open) .. ")"
end

local function render(topic)
  if not topic.parameters then return wrap(topic.text, "") end
  local lines = { signature(topic), wrap(topic.text, "  ") }
  local width = 0
  for _, parameter in ipairs(topic.parameters) do width = math.max(width, #parameter.name) end
  for _, parameter in ipairs(topic.parameters) do
    local about = parameter.text ~= "" and parameter.kind .. ": " .. parameter.text or parameter.kind
    if parameter.default then about = about .. " (" .. parameter.default .. " without)" end
    local label = "  " .. parameter.name .. (" "):rep(width - #parameter.name) .. "  "
    lines[#lines + 1] = wrap(about, (" "):rep(width + 4), label)
  end
  for i, result in ipairs(topic.results) do
    lines[#lines + 1] = wrap(result, "          ", i == 1 and "  returns " or "          ")
  end
  return table.concat(lines, "\n")
end

local topics, groups

local function load_topics()
  if topics then return end
  topics, groups = {}, {}
  for _, heading in ipairs(HEADINGS) do groups[heading] = {} end
  for _, source in ipairs(SOURCES) do
    local group = groups[source[2]]
    for i, block in ipairs(blocks_of(here .. source[1] .. ".lua")) do
      local topic = topic_of(block)
      if source[1] == "index" and i == 1 then
        topic = { name = "indexing", text = table.concat(block.text, " ") }
      elseif source[1] == "index" then
        topic = nil
      end
      if topic then
        topics[topic.name] = topic
        group[#group + 1] = topic.name
      end
    end
  end
end

--- The names there is help for, in the order they are listed.
-- @function names
function help.names()
  load_topics()
  local names = {}
  for _, heading in ipairs(HEADINGS) do
    for _, name in ipairs(groups[heading]) do names[#names + 1] = name end
  end
  return names
end

local function overview()
  local lines = { "Help on a function: ? name, such as ? attention or ? tensor.narrow. There is help on:" }
  for _, heading in ipairs(HEADINGS) do
    local names = {}
    for i, name in ipairs(groups[heading]) do names[i] = name:gsub("^tensor:", ":") end
    lines[#lines + 1] = wrap(table.concat(names, " "), (" "):rep(15), ("  %-13s"):format(heading))
  end
  return table.concat(lines, "\n")
end

--- What `? name` prints.
-- @tparam[opt] string name a function, with or without `cf.`, `t:` or `tensor.`; without it an overview
-- @treturn string
-- @function text
function help.text(name)
  load_topics()
  name = (name or ""):gsub("%s", ""):gsub("%(.*$", "")
  if name == "" then return overview() end
  local plain = name:gsub("^cuflash%.", ""):gsub("^cf%.", "")
  local member = plain:gsub("^tensor[.:]", ""):gsub("^t[.:]", ""):gsub("^ctx[.:]", ""):gsub("^:", "")
  local order = { plain, plain:gsub("%.", ":"), "tensor:" .. member, "ctx:" .. member }
  if plain ~= member then order = { "tensor:" .. member, "ctx:" .. member } end
  if plain:find("^ctx") then order = { "ctx:" .. member } end
  for _, candidate in ipairs(order) do
    if topics[candidate] then return render(topics[candidate]) end
  end
  local short = {}
  for topic in pairs(topics) do
    if topic:match("[%w_]+$") == member then return help.text(topic) end
  end
  for topic in pairs(topics) do
    local last = topic:gsub("^%a+:", "")
    if last:sub(1, #member) == member then return help.text(topic) end
    short[last] = true
  end
  return ("no help on '%s'%s; ? alone lists what there is"):format(name, errors.suggest(member, short))
end

return help
