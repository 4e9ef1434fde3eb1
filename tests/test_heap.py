"""What a process frees it touches again for nothing: counted in a process of its own, whose heap is spoilt by it."""

import ctypes
import subprocess
import sys

import pytest

PAGES = 2**14
PROGRAM = f"""
import ctypes, resource, sys
from anatomynet.export.heap import keep_freed_memory
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no large pages, of which a few hold all of it
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    before = faults()
    volume = b"x" * ({PAGES} * 4096)
    del volume
print(faults() - before)
"""


def page_faults(how: str) -> int:
    """Of the second of two volumes."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=120, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_the_next_volume_has_its_memory() -> None:
    assert page_faults("keep") < PAGES // 100
    assert page_faults("as it is") > PAGES // 2
