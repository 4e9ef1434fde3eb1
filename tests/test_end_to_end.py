"""The proof on real input: patients' CT as DICOM -> the real tritonserver -> RTSTRUCT -> plastimatch -> DSC.

Nothing in between is ours to judge: plastimatch reads the contours, the physicians' masks say where the organs are.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray

from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.checkpoint import load_checkpoint
from anatomynet.engine.data import Case
from anatomynet.engine.metrics import dice
from anatomynet.engine.region_runtime import EmbeddedRegionFinder
from anatomynet.engine.resolution import INSIDE_SHARE, block_means
from anatomynet.engine.runtime import TorchRuntime, load_runtime
from anatomynet.engine.segment import draw_reduced, segment
from anatomynet.engine.structures import STRUCTURES
from tests.openkbp import OPENKBP, REDUCTION, requires_openkbp, validation_case, write_study

if TYPE_CHECKING:
    from tests.triton_servers import ServerStarter

BIN = Path(sys.executable).parent
# All seven structures; the second at another spacing; the third outside the trained spacing, so resampled.
PATIENTS = ("pt_236", "pt_222", "pt_201")
DSC_TOLERANCE = 0.02
# A mirrored mask of a paired organ overlaps its partner's place at best by chance.
MIRRORED_DSC = 0.5

pytestmark = requires_openkbp


@pytest.fixture(scope="module")
def shipped_server(start_server: "ServerStarter", tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """HOST:PORT of the real tritonserver on the repository that anatomynet-export makes of the shipped checkpoint.

    Proved on a patient: a quarter of the synthetic one's voxels, and still more than FP16 can count.
    """
    repository = tmp_path_factory.mktemp("shipped") / "triton_repo"
    case = OPENKBP / "validation" / PATIENTS[0]
    subprocess.run([BIN / "anatomynet-export", "--fp16", "--output", repository, "--parity-input", case], check=True)
    with start_server(repository) as server:
        yield server.url


@pytest.fixture(scope="module", params=PATIENTS)
def patient(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    """A validation patient, and the folder of its DICOM study."""
    _, config = load_checkpoint()
    case = validation_case(request.param, config.structures)
    study = tmp_path_factory.mktemp(request.param) / "study"
    write_study(study, case)
    return case, study


@pytest.fixture(scope="module")
def drawn(patient: tuple[Case, Path], shipped_server: str) -> dict[str, NDArray[np.bool_]]:
    """Structure -> mask (z, y, x) of 512 x 512 slices, as plastimatch reads the command's RTSTRUCT."""
    _, study = patient
    folder = study.parent
    rtstruct = folder / "rs.dcm"
    run: list[str | Path] = [BIN / "anatomynet-client", "segment", study, "--url", shipped_server, "--output", rtstruct]
    subprocess.run(run, check=True)
    convert: list[str | Path] = ["--input", rtstruct, "--referenced-ct", study, "--output-prefix", folder / "masks"]
    subprocess.run(
        [BIN / "plastimatch", "convert", *convert, "--prefix-format", "nii.gz"], check=True, stdout=subprocess.DEVNULL
    )
    names = {structure.tg263_name: name for name, structure in STRUCTURES.items()}
    return {
        names[path.name.removesuffix(".nii.gz")]: SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(path)) > 0
        for path in (folder / "masks").glob("*.nii.gz")
    }


def on_own_grid(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A 512 x 512 mask (z, y, x) on the case's 128 x 128 grid: where at least half of the 4 x 4 pixels are inside."""
    return block_means(mask, REDUCTION) >= INSIDE_SHARE


def test_contours_lie_where_the_physicians_drew_them(
    patient: tuple[Case, Path], drawn: dict[str, NDArray[np.bool_]]
) -> None:
    case, _ = patient
    network, config = load_checkpoint()
    # The checkpoint itself, shown the same box that the server's finder cuts: another box draws a little otherwise.
    itself = TorchRuntime(network, config, region_finder=EmbeddedRegionFinder())
    expected = draw_reduced(case.volume, itself).labels
    for label, name in enumerate(config.structures, start=1):
        if case.annotated[label - 1]:
            mask = drawn.get(name)
            found = on_own_grid(mask) if mask is not None else np.zeros(case.labels.shape, bool)
            reached = dice(found, case.labels == label)
            due = dice(expected == label, case.labels == label)
            assert reached == pytest.approx(due, abs=DSC_TOLERANCE), name


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_left_is_left(patient: tuple[Case, Path], drawn: dict[str, NDArray[np.bool_]], axis: int) -> None:
    """What a flip of any axis would do to the score, so that the test above could not pass with one."""
    case, _ = patient
    _, config = load_checkpoint()
    for name in ("Parotid_L", "Parotid_R"):
        truth = case.labels == config.structures.index(name) + 1
        mask = on_own_grid(drawn[name])
        assert dice(np.flip(mask, axis), truth) < MIRRORED_DSC < dice(mask, truth)
    left, right = (np.nonzero(drawn[name])[2].mean() for name in ("Parotid_L", "Parotid_R"))
    assert left > right  # x runs to the patient's left


def test_embedded_engine_draws_the_same(patient: tuple[Case, Path], shipped_server: str) -> None:
    volume = volume_from_series(read_ct_series(patient[1]))
    with TritonRuntime(shipped_server) as server:
        served = segment(volume, server)
    embedded = segment(volume, load_runtime())
    np.testing.assert_array_equal(served.labels, embedded.labels)
    assert served.confidence == pytest.approx(embedded.confidence, abs=1e-6)
