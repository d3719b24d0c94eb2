# Tests of the scripts that make and keep what a GPU box needs; included by CMakeLists.txt of this folder.

# The programs and the library find each other, and the compiler's libraries, where they lie together: script/bundle copies them.
set_property(TARGET cuflash PROPERTY BUILD_RPATH "$ORIGIN")
get_property(programs DIRECTORY PROPERTY BUILDSYSTEM_TARGETS)
foreach(program IN LISTS programs ITEMS c_api cpp_api)
  if(TARGET ${program})
    set_target_properties(${program} PROPERTIES BUILD_RPATH_USE_ORIGIN ON BUILD_RPATH "$ORIGIN/..")
  endif()
endforeach()

# tool(name command...): a test of a script, once a build tree is good enough to show what it does.
function(tool name)
  if(CUFLASH_SANITIZE OR NOT BUILD_SHARED_LIBS OR no_luajit)
    register_skipped(tool.${name} tool "the scripts are tested in a build without sanitizers, with a shared library and LuaJIT")
  else()
    register(tool.${name} LABELS tool COMMAND ${ARGN} DIRECTORY ${PROJECT_SOURCE_DIR})
  endif()
endfunction()

tool(bundle ${CMAKE_CURRENT_SOURCE_DIR}/bundle_test.sh ${PROJECT_BINARY_DIR})
set_tests_properties(tool.bundle PROPERTIES TIMEOUT 1200)
tool(bench ${CMAKE_CURRENT_SOURCE_DIR}/bench_test.sh ${PROJECT_BINARY_DIR} $<TARGET_EXISTS:cuflash_kernels>)
tool(gpu_record ${CMAKE_CURRENT_SOURCE_DIR}/gpu_record_test.sh)
tool(gpu_record.committed ${CMAKE_CURRENT_SOURCE_DIR}/gpu_record_test.sh committed)
tool(kernel_report ${CMAKE_CURRENT_SOURCE_DIR}/kernel_report_test.sh)
if(TARGET cuflash_kernels)
  tool(kernel_report.kernels ${PROJECT_SOURCE_DIR}/script/kernel-report ${cuflash_kernels_dir} --check)
else()
  register_skipped(tool.kernel_report.kernels tool "this build has no CUDA kernels")
endif()
tool(aarch64 ${CMAKE_CURRENT_SOURCE_DIR}/aarch64_test.sh ${PROJECT_BINARY_DIR})
tool(amx ${CMAKE_CURRENT_SOURCE_DIR}/amx_test.sh ${PROJECT_BINARY_DIR})
tool(compare_torch ${CMAKE_CURRENT_SOURCE_DIR}/compare_torch_test.sh ${PROJECT_BINARY_DIR})
