"""What the CUDA driver of this machine says, asked without loading any package: is there a GPU, and which."""

import ctypes
from contextlib import suppress

_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def compute_capability() -> str | None:
    """That of the first GPU, as "8.9"; None without a driver or a GPU."""
    driver = _driver()
    if driver is None or not _devices(driver):
        return None
    device = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    found = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        found.append(value.value)
    return f"{found[0]}.{found[1]}"


def gpu_count() -> int:
    """How many GPUs this process may use; 0 without a driver."""
    driver = _driver()
    return _devices(driver) if driver is not None else 0


def why_no_gpu() -> str | None:
    """Why nothing can run on a GPU here, in words; None if one is there."""
    driver = _driver()
    if driver is None:
        return f"this machine has no CUDA driver ({_LIBRARY} is not found)"
    if not _devices(driver):
        return "the CUDA driver finds no GPU"
    return None


def _driver() -> ctypes.CDLL | None:
    with suppress(OSError):
        return ctypes.CDLL(_LIBRARY)
    return None


def _devices(driver: ctypes.CDLL) -> int:
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
