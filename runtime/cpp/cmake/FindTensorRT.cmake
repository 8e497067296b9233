# TensorRT::TensorRT: TensorRT, or TensorRT for RTX where that alone is there, with the CUDA runtime that both need.
# TensorRT_ROOT: where include/NvInferRuntime.h and the library lie.

find_path(TensorRT_INCLUDE_DIR NvInferRuntime.h HINTS ${TensorRT_ROOT} PATH_SUFFIXES include)
find_library(TensorRT_LIBRARY NAMES nvinfer tensorrt_rtx libtensorrt_rtx.so.1 HINTS ${TensorRT_ROOT} PATH_SUFFIXES lib lib64)
find_package(CUDAToolkit QUIET)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT REQUIRED_VARS TensorRT_LIBRARY TensorRT_INCLUDE_DIR CUDAToolkit_FOUND)

if(TensorRT_FOUND AND NOT TARGET TensorRT::TensorRT)
    add_library(TensorRT::TensorRT INTERFACE IMPORTED)
    set_target_properties(TensorRT::TensorRT PROPERTIES
        INTERFACE_INCLUDE_DIRECTORIES ${TensorRT_INCLUDE_DIR}
        INTERFACE_LINK_LIBRARIES "${TensorRT_LIBRARY};CUDA::cudart")
endif()
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_LIBRARY)
