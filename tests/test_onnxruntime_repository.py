"""The repository for Triton's ONNX Runtime backend in a real tritonserver: network and region finder, as written.

The server here has the Python backend alone: see tests/test_ensemble.py, whose stand-in runs the very ONNX files.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.contract import MODEL_NAME, REGION_NAME
from anatomynet.engine.errors import GeometryError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.region_runtime import EmbeddedRegionFinder, shipped_region
from anatomynet.engine.runtime import Runtime, load_runtime
from anatomynet.export import triton_models
from anatomynet.export.parity import check_parity, draw_reference
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import COARSE_SHAPE, onnxruntime_model, region_model
from tests.random_network import CALIBRATION_SHAPE, random_network, smooth_hu
from tests.test_ensemble import SHAPES, WARM_UP_SHAPES, computed_by, swap_backend
from tests.triton_servers import RunningServer, has_server, running_server, unwatched


@pytest.fixture(scope="module")
def embedded(random_onnx_files: tuple[Path, Path]) -> Runtime:
    return load_runtime(random_onnx_files[0])


@pytest.fixture(scope="module")
def server(
    random_model_config: ModelConfig, random_onnx_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    if not has_server():
        pytest.skip("no tritonserver here: pip install 'anatomynet[serve]'")
    folder, finder = tmp_path_factory.mktemp("onnxruntime"), shipped_region(".onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_models, "COMMON_SHAPES", WARM_UP_SHAPES)
        models = [
            onnxruntime_model(random_model_config, random_onnx_files[0]),
            region_model(EmbeddedRegionFinder(finder).config, finder, backend="onnxruntime"),
        ]
    write_repository(folder / "repository", models)
    for name in (MODEL_NAME, REGION_NAME):
        swap_backend(folder / "repository" / name, "onnxruntime")
    with running_server(folder / "repository", folder=folder, program=unwatched(folder)) as running:
        yield running


def test_both_warm_up_as_they_were_written(server: RunningServer) -> None:
    repository = server.log.parent / "repository"
    assert computed_by(repository / MODEL_NAME)[:3] == [[list(shape)] for shape in WARM_UP_SHAPES]
    assert computed_by(repository / REGION_NAME)[0] == [list(COARSE_SHAPE)]


def test_draws_what_the_embedded_engine_draws(server: RunningServer, embedded: Runtime) -> None:
    with TritonRuntime(server.url) as runtime:
        assert runtime.model == embedded.model
        for shape in SHAPES:
            hu = smooth_hu(shape)
            labels, confidence = runtime.infer(hu)
            expected, expected_confidence = embedded.infer(hu)
            np.testing.assert_array_equal(labels, expected)
            np.testing.assert_allclose(confidence, expected_confidence, rtol=1e-4)
            assert len(np.unique(labels)) > 2, "the case proves too little"


def test_passes_the_parity_gate(server: RunningServer, random_model_config: ModelConfig) -> None:
    reference = draw_reference(random_network(), random_model_config, smooth_hu(CALIBRATION_SHAPE))
    with TritonRuntime(server.url) as runtime:
        check_parity(reference, runtime, fp16=False)


def test_its_region_finder_finds_the_box_of_the_embedded_one(server: RunningServer) -> None:
    volume, _ = make_phantom(VolumeGeometry((59, 40, 60), (9.0, 9.0, 9.0)), seed=1, structures=("BrainStem",))
    with TritonRuntime(server.url) as runtime:
        assert runtime.region_finder is not None
        found = runtime.region_finder.find(volume.hu)
    assert (found[3:] - found[:3] > 4).all()
    assert (found[3:] - found[:3] < volume.hu.shape).any(), "the case proves too little"
    np.testing.assert_array_equal(found, EmbeddedRegionFinder(shipped_region(".onnx")).find(volume.hu))


def test_what_is_too_large_is_not_sent(server: RunningServer) -> None:
    with TritonRuntime(server.url) as runtime:
        with pytest.raises(GeometryError, match="at most"):
            runtime.infer(np.broadcast_to(np.int16(0), (2000, 512, 512)))
        assert runtime.infer(smooth_hu(SHAPES[1]))[0].shape == SHAPES[1]
