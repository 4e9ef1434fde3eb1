"""Which GPU and which TensorRT are on this machine, as the driver and the library themselves say: no package needed."""

import ctypes
from dataclasses import dataclass

DRIVER = "libcuda.so.1"
# What Triton's TensorRT backend loads; the newest first.
TENSORRT_LIBRARIES = ("libnvinfer.so.11", "libnvinfer.so.10")
MAJOR_ATTRIBUTE, MINOR_ATTRIBUTE = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU: its product name, and its compute capability as "9.0"."""

    name: str
    compute_capability: str


def visible_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs that this process may use; none where no driver answers."""
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpu(driver, index) for index in range(count.value))


def tensorrt_version() -> tuple[int, int, int] | None:
    """Of the TensorRT library that a server started here would load; None where there is none to be found."""
    for name in TENSORRT_LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        number = int(library.getInferLibVersion())  # from 10 on (major * 100 + minor) * 100 + patch
        return number // 10_000, number // 100 % 100, number % 100
    return None


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    numbers = []
    for attribute in (MAJOR_ATTRIBUTE, MINOR_ATTRIBUTE):
        number = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    return Gpu(name.value.decode(errors="replace"), ".".join(map(str, numbers)))
