"""engine/onnx_files.py: what a process keeps open; what opens and refuses files is tested with the runtimes."""

import subprocess
import sys

import pytest

# Python's handlers of signals run on a stack that OpenVINO gives the thread, and takes away.
SIGNALLED = """
import signal, sys
from threading import Thread
from anatomynet.engine.region_runtime import EmbeddedRegionFinder
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append("heard"))
opened = [EmbeddedRegionFinder(), EmbeddedRegionFinder()]
if sys.argv[1] == "here":
    del opened[0], opened[0]
else:
    thread = Thread(target=opened.clear)
    thread.start()
    thread.join()
signal.raise_signal(signal.SIGINT)
print(*heard)
"""


@pytest.mark.parametrize("closed", ["here", "in another thread"])
def test_a_signal_is_heard_after_what_openvino_opened_is_closed(closed: str) -> None:
    run = subprocess.run([sys.executable, "-c", SIGNALLED, closed], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "heard\n", "")
