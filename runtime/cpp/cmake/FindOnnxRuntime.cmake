# OnnxRuntime::OnnxRuntime: its C API. OnnxRuntime_ROOT: where the library lies, as <root>/lib or <root>; the release
# archives and the Python wheel (<site-packages>/onnxruntime/capi) will do. The wheel has no headers: these are found
# where Debian's libonnxruntime-dev puts them, or given as OnnxRuntime_INCLUDE_DIR. OnnxRuntime_FROM_WHEEL: the library,
# where it is a wheel's.

find_path(OnnxRuntime_INCLUDE_DIR onnxruntime_c_api.h
    HINTS ${OnnxRuntime_ROOT} PATH_SUFFIXES include include/onnxruntime onnxruntime)

find_library(OnnxRuntime_LIBRARY onnxruntime HINTS ${OnnxRuntime_ROOT} PATH_SUFFIXES lib)
foreach(root IN LISTS OnnxRuntime_ROOT)
    file(GLOB versioned ${root}/libonnxruntime.so.* ${root}/lib/libonnxruntime.so.*)
    if(versioned AND NOT OnnxRuntime_LIBRARY)
        list(GET versioned 0 found)
        set(OnnxRuntime_LIBRARY ${found} CACHE FILEPATH "" FORCE)
    endif()
endforeach()

get_filename_component(real_library "${OnnxRuntime_LIBRARY}" REALPATH)
string(REGEX MATCH "[0-9]+\\.[0-9]+(\\.[0-9]+)?$" OnnxRuntime_VERSION "${real_library}")

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntime
    REQUIRED_VARS OnnxRuntime_LIBRARY OnnxRuntime_INCLUDE_DIR VERSION_VAR OnnxRuntime_VERSION)

if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::OnnxRuntime)
    # Programs look for libonnxruntime.so.1 at run time; a wheel has the file under its full version alone.
    get_filename_component(folder ${real_library} DIRECTORY)
    if(EXISTS ${folder}/libonnxruntime.so.1)
        set(linked ${folder}/libonnxruntime.so.1)
    else()
        set(OnnxRuntime_FROM_WHEEL ${real_library})
        set(linked ${CMAKE_BINARY_DIR}/onnxruntime/libonnxruntime.so.1)
        file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/onnxruntime)
        file(CREATE_LINK ${real_library} ${linked} SYMBOLIC)
    endif()
    add_library(OnnxRuntime::OnnxRuntime SHARED IMPORTED)
    set_target_properties(OnnxRuntime::OnnxRuntime PROPERTIES
        IMPORTED_LOCATION ${linked}
        IMPORTED_SONAME libonnxruntime.so.1
        INTERFACE_INCLUDE_DIRECTORIES ${OnnxRuntime_INCLUDE_DIR})
endif()
mark_as_advanced(OnnxRuntime_INCLUDE_DIR OnnxRuntime_LIBRARY)
