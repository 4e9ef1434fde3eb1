"""docs/faults.md: each fault names the tests that show it, and they exist."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split(" | ")]
    for line in (FOLDER.parent / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| fault", "| ---"))
]


def test_every_fault_names_its_tests() -> None:
    assert len(ROWS) > 20
    for fault, *_, tests in ROWS:
        named = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", tests)
        assert named, fault
        file = ""
        for name, test in named:
            file = name or file
            assert f"\ndef {test}(" in (FOLDER / file).read_text(encoding="utf-8"), f"{fault}: {file} has no {test}"
