# lib, headers, the Lua module, pkg-config and CMake package files.
include(CMakePackageConfigHelpers)
set(CUFLASH_LUADIR ${CMAKE_INSTALL_DATADIR}/lua/5.1 CACHE STRING "Where the Lua module goes, under the prefix")

install(TARGETS cuflash EXPORT cuflash-targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES include/cuflash.h include/flash_attention.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY lua/ DESTINATION ${CUFLASH_LUADIR} FILES_MATCHING PATTERN "*.lua")

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/cuflash)
configure_package_config_file(cmake/cuflash-config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/cuflash-config.cmake
  INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/cuflash-config-version.cmake COMPATIBILITY SameMinorVersion)
install(EXPORT cuflash-targets NAMESPACE cuflash:: DESTINATION ${package_dir})
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/cuflash-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/cuflash-config-version.cmake
  DESTINATION ${package_dir})

# Relative to where the file lies, so that `cmake --install --prefix` and moved trees work.
file(RELATIVE_PATH cuflash_pc_to_prefix /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
configure_file(cmake/cuflash.pc.in cuflash.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/cuflash.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
