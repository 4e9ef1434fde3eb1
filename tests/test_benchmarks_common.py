"""What benchmarks share: a command's own time and memory, whatever started it; tables."""

import importlib
import sys

import click
import pytest
from click.testing import CliRunner

from benchmarks.common import run_and_measure, table_lines

PYTHON_GB = 0.05


def test_memory_is_the_commands_own() -> None:
    ballast = bytearray(200_000_000)
    small = run_and_measure([sys.executable, "-S", "-c", "print(1)"])
    large = run_and_measure([sys.executable, "-S", "-c", "bytearray(150_000_000)"])
    assert len(ballast) == 200_000_000
    assert 0 < small["peak_gb"] < PYTHON_GB
    assert 0.15 < large["peak_gb"] < 0.15 + PYTHON_GB
    assert small["wall"] > 0


def test_what_fails_is_told_by_its_last_line() -> None:
    with pytest.raises(click.ClickException, match=r"left with status 3: why$"):
        run_and_measure([sys.executable, "-c", "import sys; print('why', file=sys.stderr); sys.exit(3)"])


def test_a_table_is_markdown() -> None:
    assert table_lines(("way", "s"), [("ours", 1), ("a peer", "10.5")]) == [
        "| way    | s    |",
        "| ------ | ---- |",
        "| ours   | 1    |",
        "| a peer | 10.5 |",
    ]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *(
            (name, ["--repeats", "0"])
            for name in ("engines", "growth", "peers", "reading_writing", "stages", "transport")
        ),
        ("growth", ["--slices", "64,many"]),
        ("growth", ["--clients", "0,1"]),
        ("growth", ["--scale", "0"]),
        ("peers", ["--tiles", "0"]),
    ],
)
def test_what_cannot_be_measured_is_wrong_usage(name: str, arguments: list[str]) -> None:
    """Told at once: a median of nothing would be a traceback, minutes later."""
    main = importlib.import_module(f"benchmarks.{name}").main
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 2, run.output
