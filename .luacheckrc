std = "luajit"
max_line_length = 130
ignore = { "581" } -- not (x <= bound) is meant: a NaN must count as beyond every bound
files["spec"] = { std = "luajit+busted", max_line_length = 150 } -- a case a line
