"""The TensorRT ensemble in a real tritonserver: three written config.pbtxt, of which Triton makes one model.

The server here has the Python backend alone, so each step's backend is swapped for a model that runs the very ONNX file
in ONNX Runtime: names, types, shapes, queues, warm-ups, options and the wiring are as they were written.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import GeometryError
from anatomynet.engine.limits import largest_slices
from anatomynet.engine.runtime import OpenVinoRuntime
from anatomynet.export import triton_models
from anatomynet.export.composition import ComposedRuntime, PlanParts, plan_parts, write_part
from anatomynet.export.onnx import served_model, write_onnx
from anatomynet.export.parity import check_parity, draw_reference
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import FINISH_NAME, PLAN_NAME, PREPARE_NAME, PlanFile, tensorrt_models
from tests.random_network import CALIBRATION_SHAPE, random_config, random_graph, random_network, smooth_hu
from tests.triton_servers import RunningServer, has_server, running_server, unwatched

SHAPES = ((21, 67, 83), (16, 64, 64), (8, 32, 32))
# In place of whole CTs, for which a CPU would take a minute; of sizes that no test asks for.
WARM_UP_SHAPES = ((16, 64, 96), (24, 96, 96), (32, 96, 64))
TIPPED_SHARE = 0.01  # FP16 and FP32 of a random network

STEP = """
import json
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.computed = Path(args["model_repository"]) / "computed.txt"
        folder = Path(args["model_repository"]) / args["model_version"]
        (file,) = [path for path in folder.iterdir() if path.suffix in (".onnx", ".plan")]
        self.session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        given = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        results = self.session.run(self.outputs, given)
        with self.computed.open("a") as file:
            file.write(json.dumps([array.shape for array in given.values()]) + "\\n")
        return pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in zip(self.outputs, results)])
"""


def written_ensemble(folder: Path, config: ModelConfig, parts: PlanParts) -> Path:
    """The repository that `--backend tensorrt` writes; where the plan belongs lies the ONNX graph it is built of."""
    prepare = write_part(parts.prepare, folder / "prepare.onnx")
    network = write_part(parts.network, folder / "network.plan")
    finish = write_part(parts.finish, folder / "finish.onnx")
    plan = PlanFile(network, "10.13.0.35", "9.0", "NVIDIA H100 80GB HBM3", (largest_slices(config), 512, 512))
    write_repository(folder / "repository", tensorrt_models(config, prepare=prepare, plan=plan, finish=finish))
    return folder / "repository"


def swap_backend(model: Path, expected: str) -> None:
    """Of one step. Else the server reads what was written, but for a GPU and the name of a file that is no Python."""
    path = model / "config.pbtxt"
    text, backends = re.subn(f'^backend: "{expected}"$', 'backend: "python"', path.read_text(), flags=re.MULTILINE)
    assert backends == 1
    for named in re.findall('^default_model_filename: "(.*)"$', text, flags=re.MULTILINE):
        assert (model / "1" / named).is_file()
    text = re.sub("^default_model_filename: .*$", "", text, flags=re.MULTILINE)
    path.write_text(text.replace("kind: KIND_GPU", "kind: KIND_CPU"))
    (model / "1" / "model.py").write_text(STEP)


def computed_by(model: Path) -> list[list[list[int]]]:
    """The shapes of each request's inputs, warm-ups first."""
    return [json.loads(line) for line in (model / "computed.txt").read_text().splitlines()]


@pytest.fixture(scope="module", params=[1, 4])
def ensemble(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ModelConfig, PlanParts, RunningServer]]:
    if not has_server():
        pytest.skip("no tritonserver here: pip install 'anatomynet[serve]'")
    folder, config = tmp_path_factory.mktemp("ensemble"), random_config(request.param)
    parts = plan_parts(random_graph(), config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_models, "COMMON_SHAPES", WARM_UP_SHAPES)
        repository = written_ensemble(folder, config, parts)
    backends = {PREPARE_NAME: "onnxruntime", PLAN_NAME: "tensorrt", FINISH_NAME: "onnxruntime"}
    for name, backend in backends.items():
        swap_backend(repository / name, backend)
    with running_server(repository, folder=folder, program=unwatched(folder)) as server:
        yield config, parts, server


def test_each_step_warms_up_as_it_was_written(ensemble: tuple[ModelConfig, PlanParts, RunningServer]) -> None:
    config, _, server = ensemble
    repository, stride = server.log.parent / "repository", config.in_plane_stride
    whole = [list(shape) for shape in WARM_UP_SHAPES]
    network = [[1, 1, z, y // stride, x // stride] for z, y, x in WARM_UP_SHAPES]
    assert computed_by(repository / PREPARE_NAME)[:3] == [[shape] for shape in whole]
    assert computed_by(repository / PLAN_NAME)[:3] == [[shape] for shape in network]
    assert computed_by(repository / FINISH_NAME)[:3] == [[shape, shape] for shape in whole]


def test_draws_what_the_embedded_engine_draws(
    ensemble: tuple[ModelConfig, PlanParts, RunningServer], tmp_path: Path
) -> None:
    config, parts, server = ensemble
    path = tmp_path / "embedded.onnx"
    write_onnx(served_model(random_graph(), config, fp16=False), path)
    embedded, composed = OpenVinoRuntime(path), ComposedRuntime(parts, config)
    with TritonRuntime(server.url) as runtime:
        assert runtime.model == config
        for shape in SHAPES:
            hu = smooth_hu(shape)
            labels, confidence = runtime.infer(hu)
            expected, expected_confidence = composed.infer(hu)
            np.testing.assert_array_equal(labels, expected)
            np.testing.assert_allclose(confidence, expected_confidence, rtol=1e-5)
            in_float, _ = embedded.infer(hu)
            assert len(np.unique(in_float)) > 2, "the case proves too little"
            assert (labels != in_float).mean() < TIPPED_SHARE


def test_passes_the_parity_gate(ensemble: tuple[ModelConfig, PlanParts, RunningServer]) -> None:
    config, _, server = ensemble
    if config.in_plane_stride == 1:
        pytest.skip("the random network draws every structure at stride 4 alone")
    reference = draw_reference(random_network(), config, smooth_hu(CALIBRATION_SHAPE))
    with TritonRuntime(server.url) as runtime:
        check_parity(reference, runtime, fp16=True)


def test_what_its_plan_does_not_take_is_not_sent(ensemble: tuple[ModelConfig, PlanParts, RunningServer]) -> None:
    *_, server = ensemble
    with TritonRuntime(server.url) as runtime:
        for shape in ((16, 520, 64), (2000, 512, 512)):
            with pytest.raises(GeometryError, match="at most"):
                runtime.infer(np.broadcast_to(np.int16(0), shape))
        assert runtime.infer(smooth_hu(SHAPES[1]))[0].shape == SHAPES[1]
