"""How the C library keeps memory that was freed: a server's volumes want the same again and again.

By default every array of a volume is memory that the kernel zeroes page by page when it is touched and takes back when
it is freed. Triton's Python backend copies each CT into such an array before it hands it over: with a CT of
178 x 512 x 512 that is half the time of a model that answers at once (benchmarks/README.md).
"""

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# A volume with its label map and then some; what is freed beyond goes back.
LARGEST_KEPT = 2**30


def keep_freed_memory() -> bool:
    """Lets this process keep what it frees, up to 1 GiB, for what it allocates next; whether the C library can."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT)) and bool(mallopt(M_MMAP_MAX, 0))
