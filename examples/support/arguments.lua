-- Command lines of the examples: options, help, and refusals that say what is wrong.
local cf = require "cuflash"

local arguments = {}

local program = arg[0]:match "[^/]*$"

local HELP = { "--help", nil, "show this help and exit" }

--- The option every example has.
arguments.DEVICE = { "--device", "NAME", "where to compute: cpu, cuda or cuda:N", default = "cpu" }

--- Prints why the program cannot go on, and ends it: 1 for what went wrong, 2 for a command line it does not take.
function arguments.fail(message, code)
  io.stdout:flush()
  io.stderr:write(program, ": ", message, "\n")
  os.exit(code or 1)
end

local function refuse(message)
  arguments.fail(message .. ("; see %s --help"):format(program), 2)
end

-- What an error says, without the place in the source where it was raised.
local function sentence(message)
  return (tostring(message):gsub("^[^\n]-:%d+: ", ""))
end

--- Calls f; what it raises ends the program with a plain sentence.
function arguments.try(f, ...)
  local function finish(ok, ...)
    if ok then return ... end
    arguments.fail(sentence((...)))
  end
  return finish(pcall(f, ...))
end

local function show_help(spec)
  print(("usage: %s\n\n%s\n\noptions:"):format(spec.usage, spec.about))
  for _, option in ipairs(spec) do
    local left = option[1] .. (option[2] and " " .. option[2] or "")
    local default = option.default ~= nil and (" (default: %s)"):format(option.default) or ""
    print(("  %-18s %s%s"):format(left, option[3], default))
  end
  os.exit(0)
end

local function one_of(option, text)
  for _, choice in ipairs(option.among) do
    if choice == text then return text end
  end
  return refuse(("%s: expected one of %s, got '%s'"):format(option[1], table.concat(option.among, ", "), text))
end

-- The text of an option as the number or the choice it must be, or as it is.
local function convert(option, text)
  if text == "" then refuse(("%s: expected %s, got nothing"):format(option[1], option[2])) end
  if option.among then return one_of(option, text) end
  if not option.least then return text end
  local number = tonumber(text)
  if not number or number ~= number or math.abs(number) == math.huge then
    refuse(("%s: expected a number, got '%s'"):format(option[1], text))
  end
  if option.whole and number ~= math.floor(number) then
    refuse(("%s: expected a whole number, got %s"):format(option[1], text))
  end
  if number < option.least or number > (option.most or math.huge) then
    local range = option.most and ("from %.14g to %.14g"):format(option.least, option.most)
      or ("of at least %.14g"):format(option.least)
    refuse(("%s: expected a number %s, got %s"):format(option[1], range, text))
  end
  return number
end

local function check_device(name)
  local ok, message = pcall(cf.empty, { 1 }, { device = name })
  if not ok then arguments.fail("--" .. sentence(message):gsub("^empty: ", ""):gsub("^argument '(device)'", "%1"), 2) end
end

--- Reads the command line.
-- @tparam table spec usage, about, positional (how many are taken at most), and a list of options, each
--   {"--name", "VALUE" or nil for a flag, "what it does", default =, among = {choices}, or for a number least =, most =, whole =}
-- @treturn table what was given or the defaults: by name, and the positional ones from 1 on
function arguments.parse(spec)
  table.insert(spec, arguments.DEVICE)
  table.insert(spec, HELP)
  local known, given = {}, {}
  for _, option in ipairs(spec) do
    known[option[1]] = option
    given[option[1]:sub(3)] = option.default
  end
  local i, only_names = 1, false
  while arg[i] do
    local word = arg[i]
    if only_names or word == "-" or word:sub(1, 1) ~= "-" then
      if #given == (spec.positional or 0) then refuse(("unexpected argument '%s'"):format(word)) end
      given[#given + 1] = word
    elseif word == "--" then
      only_names = true
    else
      local name, value = word:match "^(%-%-[^=]+)=(.*)$"
      name = name or word
      local option = known[name]
      if not option then refuse(("unknown option '%s'"):format(name)) end
      if option == HELP then show_help(spec) end
      if option[2] then
        if not value then
          i = i + 1
          value = arg[i]
        end
        if not value then refuse(("%s: expected %s after it"):format(name, option[2])) end
        given[name:sub(3)] = convert(option, value)
      else
        if value then refuse(("%s takes no value, got '%s'"):format(name, value)) end
        given[name:sub(3)] = true
      end
    end
    i = i + 1
  end
  check_device(given.device)
  return given
end

return arguments
