"""Real patients for tests: cases of OpenKBP, where the data lies beside the checkout, as DICOM studies."""

from pathlib import Path

import pytest

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.engine.data import Case, read_case
from anatomynet.engine.resolution import enlarged

OPENKBP = Path(__file__).resolve().parents[2] / "shared" / "data" / "openkbp"
REDUCTION = 4  # the data set's authors reduced 512 x 512 slices 4 x 4

requires_openkbp = pytest.mark.skipif(not OPENKBP.is_dir(), reason=f"no OpenKBP data at {OPENKBP}")


def validation_case(name: str, structures: tuple[str, ...]) -> Case:
    """One validation patient on the data set's own 128 x 128 grid."""
    return read_case(OPENKBP / "validation" / name, structures)


def write_study(folder: Path, case: Case) -> None:
    """The case as a DICOM CT study of 512 x 512 slices."""
    write_ct_series(folder, enlarged(case.volume, REDUCTION), seed=1)
