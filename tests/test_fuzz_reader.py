"""Damaged studies end in a result or in one line; ANATOMYNET_FUZZ=10000 reads that many."""

import json
import os
import subprocess
import sys

INPUTS = int(os.environ.get("ANATOMYNET_FUZZ", "300"))


def test_every_damaged_study_ends_in_a_result_or_one_line() -> None:
    """In a process of its own: its memory is limited, and a decoder could end it."""
    command = [sys.executable, "-m", "tests.fuzz_reader", "--count", str(INPUTS)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    summary = json.loads(run.stdout.splitlines()[-1])
    assert sum(summary["outcomes"].values()) == INPUTS
    assert {"result", "StudyError", "GeometryError"} <= set(summary["outcomes"])
