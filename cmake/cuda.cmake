# The CUDA kernels: finds nvcc, has kernels/ compiled, and embeds the result in the library.
#
# Sets cuflash_cuda_include (the toolkit's headers, for tests), cuflash_kernels_source (the file that embeds the kernels, or says
# that there are none) and, where there are some, the target cuflash_kernels and cuflash_kernels_dir, where the fatbins are.
if(NOT CUFLASH_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "CUFLASH_CUDA: expected AUTO, ON or OFF, got '${CUFLASH_CUDA}'")
endif()
set(CUFLASH_CUDA_ARCHITECTURES all CACHE STRING
  "Architectures to compile CUDA kernels for: all, or some of 70;75;80;86;89;90a;100;120 (PTX for later ones comes along)")
set(CUFLASH_KERNELS_DIR ${CMAKE_CURRENT_BINARY_DIR}/kernels CACHE PATH "Where the CUDA kernels are compiled; builds may share it")

set(cuflash_cuda_include "")
set(cuflash_kernels_source ${CMAKE_CURRENT_BINARY_DIR}/kernels.c)
set(fatbins element rows mma_forward mma_backward tf32_forward fma_forward fma_backward fma_half_forward fma_half_backward)
set(hopper_fatbins hopper_forward hopper_backward) # of sm_90a alone
set(toolkit 0)
if(NOT CUFLASH_CUDA STREQUAL "OFF")
  find_package(CUDAToolkit QUIET)
  if(CUDAToolkit_FOUND AND CUDAToolkit_NVCC_EXECUTABLE)
    list(GET CUDAToolkit_INCLUDE_DIRS 0 cuflash_cuda_include)
    math(EXPR toolkit "${CUDAToolkit_VERSION_MAJOR} * 1000 + ${CUDAToolkit_VERSION_MINOR} * 10")
  elseif(CUFLASH_CUDA STREQUAL "ON")
    message(FATAL_ERROR "CUFLASH_CUDA=ON, but no CUDA toolkit with nvcc was found (is nvcc on the PATH, or CUDAToolkit_ROOT set?)")
  else()
    message(STATUS "No CUDA toolkit found: building for the CPU alone")
  endif()
endif()

if(toolkit)
  execute_process(COMMAND ${CUDAToolkit_NVCC_EXECUTABLE} --list-gpu-code OUTPUT_VARIABLE supported)
  set(architectures "")
  set(wanted 70 75 80 86 89 90a 100 120)
  if(NOT CUFLASH_CUDA_ARCHITECTURES STREQUAL "all")
    foreach(architecture IN LISTS CUFLASH_CUDA_ARCHITECTURES)
      if(NOT architecture IN_LIST wanted)
        message(FATAL_ERROR "CUFLASH_CUDA_ARCHITECTURES: expected all, or some of ${wanted}, got '${architecture}'")
      endif()
    endforeach()
    set(wanted ${CUFLASH_CUDA_ARCHITECTURES})
  endif()
  foreach(architecture IN LISTS wanted)
    string(REGEX REPLACE "[a-z]$" "" number ${architecture})
    if(supported MATCHES "sm_${number}[^0-9]")
      list(APPEND architectures ${architecture})
    elseif(NOT CUFLASH_CUDA_ARCHITECTURES STREQUAL "all")
      message(FATAL_ERROR "CUFLASH_CUDA_ARCHITECTURES: CUDA ${CUDAToolkit_VERSION} does not compile for sm_${number}")
    endif()
  endforeach()
  message(STATUS "CUDA toolkit ${CUDAToolkit_VERSION}: kernels for sm_${architectures}")

  if("90a" IN_LIST architectures)
    list(APPEND fatbins ${hopper_fatbins})
    set(hopper_fatbins "")
  endif()
  set(cuflash_kernels_dir ${CUFLASH_KERNELS_DIR})
  list(TRANSFORM fatbins REPLACE "(.+)" "${cuflash_kernels_dir}/\\1.fatbin" OUTPUT_VARIABLE fatbin_files)
  file(MAKE_DIRECTORY ${cuflash_kernels_dir})
  # Configured and built by one command each time: without changes that takes a tenth of a second. A lock, as builds share it.
  file(WRITE ${cuflash_kernels_dir}/build.cmake "
    file(LOCK ${cuflash_kernels_dir}/lock)
    execute_process(COMMAND ${CMAKE_COMMAND} -S ${PROJECT_SOURCE_DIR}/kernels -B ${cuflash_kernels_dir} -G \"${CMAKE_GENERATOR}\"
      \"-DCUFLASH_NVCC=${CUDAToolkit_NVCC_EXECUTABLE}\" \"-DCUFLASH_CUDA_ARCHITECTURES=${architectures}\"
      -DCUFLASH_FAST_MATH=${ENABLE_FAST_MATH} -DCMAKE_MAKE_PROGRAM=${CMAKE_MAKE_PROGRAM} OUTPUT_QUIET COMMAND_ERROR_IS_FATAL ANY)
    execute_process(COMMAND ${CMAKE_COMMAND} --build ${cuflash_kernels_dir} COMMAND_ERROR_IS_FATAL ANY)
  ")
  add_custom_target(cuflash_kernels ALL COMMAND ${CMAKE_COMMAND} -P ${cuflash_kernels_dir}/build.cmake
    BYPRODUCTS ${fatbin_files} USES_TERMINAL COMMENT "Building the CUDA kernels")
endif()

set(embed "/* Made by cmake/cuda.cmake. */\n#include \"cuda/cuda.h\"\n\nconst int cuflash_kernels_toolkit = ${toolkit};\n")
foreach(name IN LISTS fatbins hopper_fatbins)
  if(toolkit AND name IN_LIST fatbins)
    string(APPEND embed "
__asm__(\".section .rodata\\n.balign 64\\ncuflash_${name}_data:\\n.incbin \\\"${cuflash_kernels_dir}/${name}.fatbin\\\"\\n.previous\");
extern const char cuflash_${name}_data[] __attribute__((visibility(\"hidden\")));
const cuflash_fatbin cuflash_fatbin_${name} = {\"${name}\", cuflash_${name}_data};
")
  else()
    string(APPEND embed "const cuflash_fatbin cuflash_fatbin_${name} = {\"${name}\", 0};\n")
  endif()
endforeach()
file(CONFIGURE OUTPUT ${cuflash_kernels_source} CONTENT "${embed}" @ONLY)
set_source_files_properties(${cuflash_kernels_source} PROPERTIES OBJECT_DEPENDS "${fatbin_files}")
