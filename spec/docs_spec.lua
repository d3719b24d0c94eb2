-- The Lua in README and the guide runs as pasted: the blocks of a page, one after the other, as one chunk.

local function lua_blocks(path)
  local file = assert(io.open(path))
  local lines, inside = {}, false
  for line in file:lines() do
    if line:match "^```" then
      inside = line == "```lua"
      lines[#lines + 1] = ""
    else
      lines[#lines + 1] = inside and line or "" -- line numbers stay those of the page
    end
  end
  file:close()
  return table.concat(lines, "\n")
end

local function run(path)
  local printed = {}
  local environment = setmetatable({
    print = function(...)
      for i = 1, select("#", ...) do printed[#printed + 1] = tostring(select(i, ...)) end
    end,
  }, { __index = _G })
  local chunk = assert(loadstring(lua_blocks(path), "@" .. path))
  setfenv(chunk, environment)
  chunk()
  return table.concat(printed, "\n")
end

describe("the documentation's Lua", function()
  it("runs in README.md and finds the result right", function()
    local printed = run "README.md"
    assert.matches("close: 524288 elements", printed, 1, true)
    assert.matches("kernel: cpu", printed, 1, true)
  end)

  it("runs in docs/guide.md and shows what the page says", function()
    local printed = run "docs/guide.md"
    assert.matches("did you mean 'causal'", printed, 1, true)
    assert.matches("no/such/file.npy", printed, 1, true)
    assert.matches("gradients agree", printed, 1, true)
  end)
end)
