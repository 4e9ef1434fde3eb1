"""Which GPU and which TensorRT are on this machine, as the driver and the library themselves say: no package needed."""

import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DRIVER = "libcuda.so.1"
# What Triton's TensorRT backend loads; the newest first. A Triton container has it where the loader looks; the backend
# is linked to look beside itself too.
TENSORRT_LIBRARIES = ("libnvinfer.so.11", "libnvinfer.so.10")
BACKEND_FOLDER = Path("/opt/tritonserver/backends/tensorrt")
MAJOR_ATTRIBUTE, MINOR_ATTRIBUTE = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU: its product name, and its compute capability as "9.0"."""

    name: str
    compute_capability: str

    @property
    def label(self) -> str:
        """Both, as a file's name can hold them: "sm90-nvidia-h100-80gb-hbm3"."""
        product = re.sub("[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return f"sm{self.compute_capability.replace('.', '')}-{product}"


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


def tensorrt_versions() -> tuple[tuple[int, int, int], ...]:
    """Of the TensorRT libraries that a server started here may load, as they say themselves; none where none is found.

    Mostly one. Of two, a server's backend was linked to either.
    """
    numbers = dict.fromkeys(int(library.getInferLibVersion()) for library in _tensorrt_libraries())
    # From 10 on (major * 100 + minor) * 100 + patch.
    return tuple((number // 10_000, number // 100 % 100, number % 100) for number in numbers)


def _tensorrt_libraries() -> Iterator[ctypes.CDLL]:
    for name in TENSORRT_LIBRARIES:
        for place in (name, str(BACKEND_FOLDER / name)):
            try:
                library = ctypes.CDLL(place)
            except OSError:
                continue
            if hasattr(library, "getInferLibVersion"):
                yield library


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
