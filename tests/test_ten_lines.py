"""triton_repo/README.md: the lines between its fences call the served model, without this package."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from anatomynet.client.triton import TritonRuntime
from tests.random_network import smooth_hu
from tests.triton_servers import RunningServer

README = Path(__file__).parents[1] / "triton_repo" / "README.md"
SHAPE = (24, 96, 128)


@pytest.fixture(scope="module")
def lines() -> str:
    (text,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)
    return str(text)


def test_they_are_few_and_need_nothing_of_ours(lines: str) -> None:
    imports, calls = lines.split("\n\n")
    assert "anatomynet" not in imports
    assert "import" not in calls
    assert len(calls.splitlines()) <= 10


def test_they_get_what_our_client_gets(lines: str, triton_server: RunningServer, tmp_path: Path) -> None:
    hu = smooth_hu(SHAPE)
    np.save(tmp_path / "ct.npy", hu)
    arguments = [triton_server.url, "ct.npy", "labels.npy"]
    command = [sys.executable, "-W", "error", "-c", lines, *arguments]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    with TritonRuntime(triton_server.url) as runtime:
        labels, confidence = runtime.infer(hu)
        names = runtime.model.structures
    found = np.load(tmp_path / "labels.npy")
    np.testing.assert_array_equal(found, labels)
    assert (found.dtype, np.unique(found).size) == (np.uint8, len(names) + 1)
    assert run.stdout.splitlines() == [f"{name} {sure:.2f}" for name, sure in zip(names, confidence, strict=True)]
    assert run.stderr == ""
