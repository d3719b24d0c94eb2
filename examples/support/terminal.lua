-- A progress line: rewritten in place on a terminal, an ordinary line every so often where stdout is a file or a pipe.
local ffi = require "ffi"

ffi.cdef [[ int cuflash_examples_isatty(int descriptor) __asm__("isatty"); ]]

local terminal = { is_interactive = ffi.C.cuflash_examples_isatty(1) == 1 }

local open = false -- whether the cursor stands at the end of a progress line

--- Shows the latest state. `milestone` says whether it is worth a line of its own where lines cannot be rewritten.
function terminal.progress(text, milestone)
  if terminal.is_interactive then
    io.stdout:write("\r", text, "\27[K")
    open = true
  elseif milestone then
    io.stdout:write(text, "\n")
  end
  io.stdout:flush()
end

--- Leaves the progress line as it is; what is printed next starts below it.
function terminal.finish()
  if open then io.stdout:write "\n" end
  open = false
end

--- Calls f, which shows progress; true and what it returns, or false where Ctrl-C ended it. Other errors are raised.
function terminal.run(f)
  local ok, result = pcall(f)
  terminal.finish()
  if not ok and not tostring(result):find "interrupted" then error(result, 0) end
  return ok, result
end

return terminal
