# Makes OUTPUT, a C file with cuflash_ffi_cdef(), from the text in INPUT.
file(READ ${INPUT} text)
string(REPLACE "\\" "\\\\" text "${text}")
string(REPLACE "\"" "\\\"" text "${text}")
string(REPLACE "\n" "\\n\"\n           \"" text "${text}")
file(WRITE ${OUTPUT} "#include \"cuflash.h\"\n\nconst char *cuflash_ffi_cdef(void) {\n    return \"${text}\";\n}\n")
