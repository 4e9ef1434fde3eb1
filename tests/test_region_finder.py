"""The learned region finder: its ONNX against PyTorch, in a Triton repository, and through `segment` on a phantom."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from numpy.typing import NDArray

torch = pytest.importorskip("torch")

from anatomynet.client.connection import describe_runtime  # noqa: E402  after the skip
from anatomynet.client.triton import TritonRuntime  # noqa: E402
from anatomynet.engine.checkpoint import (  # noqa: E402
    load_checkpoint,
    load_region_checkpoint,
    save_checkpoint,
    save_region_checkpoint,
)
from anatomynet.engine.config import load_config, shipped_weights  # noqa: E402
from anatomynet.engine.errors import GeometryError, ModelError, ParityError  # noqa: E402
from anatomynet.engine.geometry import VolumeGeometry  # noqa: E402
from anatomynet.engine.limits import largest_voxels  # noqa: E402
from anatomynet.engine.metrics import dice  # noqa: E402
from anatomynet.engine.phantom import make_phantom  # noqa: E402
from anatomynet.engine.region import (  # noqa: E402
    RegionConfig,
    RegionFinder,
    coarse_factors,
    coarse_from_hu,
    finder_of,
    region_config_from_json,
)
from anatomynet.engine.region_network import RegionNetwork, ServedRegion  # noqa: E402
from anatomynet.engine.region_runtime import (  # noqa: E402
    LARGEST_COARSE,
    EmbeddedRegionFinder,
    _opened_by_onnxruntime,
    _opened_by_openvino,
    shipped_region,
)
from anatomynet.engine.runtime import Runtime, load_runtime  # noqa: E402
from anatomynet.engine.segment import segment  # noqa: E402
from anatomynet.engine.volume import CTVolume, LabelMap  # noqa: E402
from anatomynet.export.forms import region_form  # noqa: E402
from anatomynet.export.manifest import check_repository, read_manifest  # noqa: E402
from anatomynet.export.region import check_region_parity, export_region  # noqa: E402
from anatomynet.export.region import region_model as region_graph  # noqa: E402
from anatomynet.export.repository import write_repository  # noqa: E402
from anatomynet.export.triton_models import python_model, region_model  # noqa: E402
from tests.triton_servers import RunningServer, ServerStarter  # noqa: E402

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")

MODEL, _ = load_config("openkbp7")
# A head, its neck and the shoulders, on few voxels; of it the finder needs less than half.
PHANTOM = VolumeGeometry((112, 256, 256), (1.95, 1.95, 3.0))
SHAPES = ((59, 40, 60), (13, 22, 31), (1, 1, 1), (2, 40, 7), (4, 8, 16))
SEED = 1808


@pytest.fixture(scope="module")
def phantom() -> tuple[CTVolume, LabelMap]:
    return make_phantom(PHANTOM, seed=SEED, structures=MODEL.structures)


@pytest.fixture(scope="module")
def slab(phantom: tuple[CTVolume, LabelMap]) -> CTVolume:
    """Few slices, told as finer ones, so that nothing is resampled: what is drawn is only compared."""
    hu = np.ascontiguousarray(phantom[0].hu[50:82])
    return CTVolume(hu, VolumeGeometry((32, *PHANTOM.shape[1:]), (1.2, 1.2, 3.0)))


def random_finder(hu: NDArray[np.int16]) -> tuple[RegionNetwork, RegionConfig]:
    """Weights by chance, and a threshold that few voxels of this CT pass."""
    torch.manual_seed(SEED)
    network = RegionNetwork().eval()
    config = RegionConfig(MODEL.structures, (8.0, 8.0, 6.0), (-1000.0, 1000.0), threshold=0.0, margin=(0, 1, 2))
    with torch.inference_mode():
        logits = ServedRegion(network, config).logits(torch.from_numpy(hu))
    return network, dataclasses.replace(config, threshold=float(torch.quantile(logits, 0.98)) - 1e-4)


@pytest.mark.parametrize("opened", [_opened_by_openvino, _opened_by_onnxruntime])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_engines_find_what_pytorch_finds(shape: tuple[int, int, int], opened: Any, tmp_path: Path) -> None:
    hu = np.random.default_rng(SEED).integers(-1500, 1500, shape, dtype=np.int16)
    network, config = random_finder(hu)
    (tmp_path / "region.onnx").write_bytes(region_graph(network, config).SerializeToString())
    find, text, _ = opened(tmp_path / "region.onnx")
    assert region_config_from_json(text) == config
    for given in (hu, np.full(shape, -1000, np.int16)):
        expected = ServedRegion(network, config)(torch.from_numpy(given)).tolist()
        box = find(given)
        assert (box.dtype, box.shape) == (np.int64, (6,))
        assert box.tolist() == expected


def test_the_shipped_file_is_that_of_the_shipped_checkpoint() -> None:
    network, config = load_region_checkpoint()
    finder = EmbeddedRegionFinder()
    assert finder.config == config
    assert set(MODEL.structures) <= set(config.structures)
    check_region_parity(network, finder)


def test_a_file_that_finds_another_box_is_refused(tmp_path: Path) -> None:
    network, config = load_region_checkpoint()
    export_region(network, config, tmp_path / "region.onnx")
    with torch.no_grad():
        network.get_parameter("classify.bias").sub_(3)
    with pytest.raises(ParityError, match="where its checkpoint finds"):
        check_region_parity(network, EmbeddedRegionFinder(tmp_path / "region.onnx"))


def test_nothing_is_found_in_air() -> None:
    assert not EmbeddedRegionFinder().find(np.full((40, 30, 50), -1000, np.int16)).any()


WRONG = [np.zeros((0, 4, 4), np.int16), np.zeros((4, 4), np.int16), np.zeros((4, 4, 4), np.float32)]


@pytest.mark.parametrize("coarse", WRONG, ids=["empty", "2-D", "float"])
def test_another_array_is_refused_in_one_line(coarse: NDArray[Any]) -> None:
    with pytest.raises(GeometryError, match="expected a coarse CT") as caught:
        EmbeddedRegionFinder().find(coarse)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("opened", [_opened_by_openvino, _opened_by_onnxruntime])
def test_an_engine_that_fails_is_told_in_one_line(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    finder = EmbeddedRegionFinder()
    find, _, failures = opened(shipped_region(".onnx"))
    monkeypatch.setattr(finder, "_find", lambda _: find(np.zeros((0, 4, 4), np.int16)))  # which fails for real
    monkeypatch.setattr(finder, "_failures", failures)
    with pytest.raises(ModelError, match="the region finder could not compute a volume") as caught:
        finder.find(np.zeros((4, 4, 4), np.int16))
    assert "\n" not in str(caught.value)


def test_a_ct_that_was_not_averaged_is_refused_before_memory_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anatomynet.engine.machine.available_memory", lambda: 2**30)
    with pytest.raises(ModelError, match=r"takes about 1\.3 GB of memory"):
        EmbeddedRegionFinder().find(np.zeros((64, 256, 256), np.int16))


def test_a_whole_ct_is_refused_before_it_is_computed_for_a_minute() -> None:
    with pytest.raises(GeometryError, match=r"at most 4194304 .*found int16 of shape \(178, 512, 512\)") as caught:
        EmbeddedRegionFinder().find(np.zeros((178, 512, 512), np.int16))
    assert "\n" not in str(caught.value)


def test_the_largest_ct_averaged_is_below_what_is_refused() -> None:
    """At the finest and the coarsest spacing that the model is not resampled from."""
    for spacing in (MODEL.smallest_spacing, MODEL.largest_spacing):
        factors = coarse_factors(spacing, EmbeddedRegionFinder().config)
        assert largest_voxels(MODEL) / math.prod(factors) < 0.7 * LARGEST_COARSE


@pytest.mark.parametrize("kept", [slice(None), slice(30, None), slice(0, 85)])
def test_every_structure_of_a_phantom_is_inside(kept: slice, phantom: tuple[CTVolume, LabelMap]) -> None:
    """The whole scan; no trunk; a scan that ends at the base of the skull."""
    volume, truth = phantom
    finder = EmbeddedRegionFinder()
    factors = coarse_factors(PHANTOM.spacing, finder.config)
    box = finder.find(coarse_from_hu(np.ascontiguousarray(volume.hu[kept]), factors))
    places = np.argwhere(truth.labels[kept])
    reach = 1 if kept == slice(None) else 2  # of its own coarse voxels, which a box of `segment` is rounded by
    assert (box[:3] * factors <= places.min(axis=0) + reach * np.array(factors)).all()
    assert (box[3:] * factors >= places.max(axis=0) + 1 - reach * np.array(factors)).all()
    assert np.prod(box[3:] - box[:3]) < 0.5 * np.prod(np.floor_divide(volume.hu[kept].shape, factors))


class CutShort:
    """A runtime whose region finder's box begins too far left, by so many coarse voxels."""

    def __init__(self, runtime: Runtime, finder: RegionFinder, coarse_voxels: int) -> None:
        self.model, self.description, self.infer = runtime.model, runtime.description, runtime.infer
        self.config, self.region_finder = finder.config, self
        self._finder, self._first = finder, np.array([0, 0, coarse_voxels, 0, 0, 0])

    def find(self, coarse: NDArray[np.int16]) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self._finder.find(coarse) + self._first
        return found


def test_an_organ_that_the_box_cuts_off_is_drawn_all_the_same() -> None:
    """Near such a face the network draws nothing of it: it does not reach the face, it is not there."""
    runtime = load_runtime()
    finder = finder_of(runtime)
    assert finder is not None
    volume, _ = make_phantom(seed=3, structures=MODEL.structures)
    right = MODEL.structures.index("Parotid_R") + 1
    expected, drawn = (segment(volume, CutShort(runtime, finder, cut)).labels == right for cut in (0, 5))
    assert dice(drawn, expected) > 0.95


@pytest.fixture(scope="module")
def shipped_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped network and the shipped region finder, as anatomynet-export lays them down."""
    folder = tmp_path_factory.mktemp("shipped")
    onnx_file = shipped_weights(".onnx")
    config = load_runtime(onnx_file).model
    models = [
        python_model(config, [onnx_file]),
        *region_form(load_region_checkpoint(), config, folder, backend="python"),
    ]
    write_repository(folder / "triton_repo", models)
    return folder / "triton_repo"


@pytest.fixture(scope="module")
def shipped_server(start_server: ServerStarter, shipped_repository: Path) -> Iterator[RunningServer]:
    with start_server(shipped_repository) as server:
        yield server


def test_server_and_embedded_engine_draw_the_same(
    shipped_server: RunningServer, phantom: tuple[CTVolume, LabelMap]
) -> None:
    volume, truth = phantom
    embedded = segment(volume, load_runtime())
    with TritonRuntime(shipped_server.url) as runtime:
        assert "region finder" not in describe_runtime(runtime)
        served = segment(volume, runtime)
        whole = segment(volume, runtime, whole_volume=True)
    np.testing.assert_array_equal(served.labels, embedded.labels)
    assert served.computed_share == embedded.computed_share
    assert served.notes == embedded.notes
    assert served.computed_share is not None
    assert whole.computed_share is not None
    assert served.computed_share < 0.5 * whole.computed_share
    assert set(np.unique(served.labels)) == set(np.unique(truth.labels)) == set(np.unique(whole.labels))


def test_a_server_refuses_an_empty_coarse_ct_in_one_line_and_serves_on(shipped_server: RunningServer) -> None:
    from tritonclient.grpc import InferenceServerClient, InferInput
    from tritonclient.utils import InferenceServerException

    def asked(coarse: NDArray[Any]) -> Any:
        tensor = InferInput("CT_COARSE", coarse.shape, "INT16")
        tensor.set_data_from_numpy(coarse)
        with InferenceServerClient(shipped_server.url) as client:
            return client.infer("anatomynet_region", [tensor]).as_numpy("BOX")

    with pytest.raises(InferenceServerException, match="expected a coarse CT") as caught:
        asked(np.zeros((0, 4, 4), np.int16))
    assert "\n" not in caught.value.message()
    assert asked(np.full((1, 1, 1), -1000, np.int16)).tolist() == [0] * 6


def test_a_server_without_a_finder_is_told_and_draws_on_the_whole(
    start_server: ServerStarter, tmp_path: Path, slab: CTVolume
) -> None:
    onnx_file = shipped_weights(".onnx")
    write_repository(tmp_path / "repo", [python_model(load_runtime(onnx_file).model, [onnx_file])])
    with start_server(tmp_path / "repo") as server, TritonRuntime(server.url) as runtime:
        assert describe_runtime(runtime).endswith("without a region finder")
        drawn = segment(slab, runtime)
    whole = segment(slab, load_runtime(), whole_volume=True)
    assert drawn.labels.any()
    np.testing.assert_array_equal(drawn.labels, whole.labels)


def test_a_finder_that_goes_away_costs_no_study(
    start_server: ServerStarter, shipped_repository: Path, slab: CTVolume
) -> None:
    options = ("--model-control-mode=explicit", "--load-model=anatomynet", "--load-model=anatomynet_region")
    with start_server(shipped_repository, *options) as server, TritonRuntime(server.url) as runtime:
        runtime._servers[0].client.unload_model("anatomynet_region")
        drawn = segment(slab, runtime)
        whole = segment(slab, runtime, whole_volume=True)
    assert drawn.labels.any()
    assert any(note.startswith("anatomynet_region did not answer") for note in drawn.notes)
    np.testing.assert_array_equal(drawn.labels, whole.labels)


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_config_pbtxt(backend: str) -> None:
    _, config = load_region_checkpoint()
    model = region_model(config, shipped_region(".onnx"), backend=backend)
    told = text_format.Parse(model.config_text, model_config_pb2.ModelConfig())
    assert (told.name, told.backend, told.max_batch_size) == ("anatomynet_region", backend, 0)
    kinds = model_config_pb2.DataType
    assert [(t.name, kinds.Name(t.data_type), list(t.dims)) for t in told.input] == [
        ("CT_COARSE", "TYPE_INT16", [-1, -1, -1])
    ]
    assert [(t.name, kinds.Name(t.data_type), list(t.dims)) for t in told.output] == [("BOX", "TYPE_INT64", [6])]
    assert told.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    parameters = {key: value.string_value for key, value in told.parameters.items()}
    assert region_config_from_json(parameters["region_config"]) == config
    assert parameters["structures"].split(",") == list(config.structures)
    assert [float(mm) for mm in parameters["coarse_spacing_mm_xyz"].split()] == list(config.coarse_spacing)
    assert set(model.files) == ({"model.onnx", "model.py"} if backend == "python" else {"model.onnx"})


def test_the_manifest_lists_the_finder_and_an_export_without_one_takes_it_away(tmp_path: Path) -> None:
    onnx_file = shipped_weights(".onnx")
    network = python_model(MODEL, [onnx_file])
    finder = region_model(load_region_checkpoint()[1], shipped_region(".onnx"), backend="python")
    write_repository(tmp_path / "repo", [network, finder])
    check_repository(tmp_path / "repo")
    listed = read_manifest(tmp_path / "repo" / "anatomynet_region")["sha256"]
    assert set(listed) == {"config.pbtxt", "1/model.py", "1/model.onnx"}
    write_repository(tmp_path / "repo", [network])
    assert [path.name for path in (tmp_path / "repo").iterdir()] == ["anatomynet"]


def test_a_model_with_more_structures_gets_no_finder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    oar9, _ = load_config("oar9")
    assert region_form(load_region_checkpoint(), oar9, tmp_path, backend="python") == []
    assert "without a region finder: it does not know Chiasm" in capsys.readouterr().out


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = shipped_region(".onnx").read_bytes()
    (tmp_path / "region.onnx").write_bytes(whole[:1000])
    with pytest.raises(ModelError, match="damaged or not ONNX"):
        EmbeddedRegionFinder(tmp_path / "region.onnx")
    with pytest.raises(ModelError, match="is no region finder"):
        EmbeddedRegionFinder(shipped_weights(".onnx"))
    with pytest.raises(ModelError, match="no model"):
        EmbeddedRegionFinder(tmp_path / "none.onnx")


def test_checkpoints_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="carries no region_config"):
        load_region_checkpoint(shipped_weights(".safetensors"))
    with pytest.raises(ModelError, match="carries no model_config"):
        load_checkpoint(shipped_region(".safetensors"))
    save_region_checkpoint(tmp_path / "same.safetensors", *load_region_checkpoint())
    assert load_region_checkpoint(tmp_path / "same.safetensors")[1] == load_region_checkpoint()[1]
    save_checkpoint(tmp_path / "again.safetensors", *load_checkpoint())
    assert load_checkpoint(tmp_path / "again.safetensors")[1] == load_checkpoint()[1]


def test_whole_volume_on_the_command_line(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("anatomynet-client")
    from anatomynet.client.ct_writer import write_ct_series

    volume, _ = make_phantom(VolumeGeometry((72, 160, 160), (3.0, 3.0, 4.0)), seed=SEED)
    study = tmp_path / "study"
    study.mkdir()
    write_ct_series(study, volume, seed=SEED)
    shares = []
    for options in ((), ("--whole-volume",)):
        report = tmp_path / f"report{len(options)}.json"
        run: list[str | Path] = [script, "segment", study, "--report", report, "--overwrite", *options]
        done = subprocess.run(run, check=True, capture_output=True, text=True)
        share = json.loads(report.read_text())["computed_share"]
        assert f"computed: {share:.0%} of the scan's voxels" in done.stdout
        shares.append(share)
    assert shares[0] < 0.6 * shares[1]
