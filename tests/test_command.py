"""What a command says where it cannot speak, and what it does not hide."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = """
import click
from anatomynet.engine.command import reports_errors

@click.command()
@reports_errors
def main() -> None:
    {}

main()
"""


def run(body: str, stdout: Path) -> subprocess.CompletedProcess[str]:
    with stdout.open("w") as file:
        command = [sys.executable, "-c", COMMAND.format(body)]
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        return subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False, env=buffered)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("body", ["click.echo('a line')", "print('a' * 100_000)"])
def test_output_that_cannot_be_written_is_one_line(body: str) -> None:
    """As where `> log.txt` is on a full disk."""
    ended = run(body, Path("/dev/full"))
    place = "where the output goes, or for temporary files"
    line = f"error: No space left on device {place}: make room, and run it again\n"
    assert (ended.returncode, ended.stderr) == (1, line)


def test_another_fault_of_the_system_is_not_taken_for_it(tmp_path: Path) -> None:
    ended = run("open('/nowhere/to/be/found')", tmp_path / "out.txt")
    assert ended.returncode == 1
    assert "FileNotFoundError" in ended.stderr
