"""Two real servers of two checkpoints behind one name: a client finds out where it happens to ask the other."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import ServerError
from anatomynet.engine.runtime import load_runtime
from anatomynet.export.onnx import served_model, write_onnx
from anatomynet.export.repository import write_repository
from anatomynet.export.triton_models import python_model
from tests.random_network import random_graph, smooth_hu
from tests.triton_servers import RunningServer, ServerStarter

pytest.importorskip("tritonclient.grpc")
SHAPE = (24, 96, 128)
VOLUMES = 8


def test_it_is_told_where_it_is_found(
    triton_server: RunningServer,
    start_server: ServerStarter,
    random_model_config: ModelConfig,
    random_onnx_files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    """Either an answer or one line; never anything else."""
    other = dataclasses.replace(random_model_config, checkpoint_sha256="0ddba11" + "0" * 57)
    write_onnx(served_model(random_graph(), other, fp16=False), tmp_path / "anatomynet.onnx")
    write_repository(tmp_path / "repository", [python_model(other, [tmp_path / "anatomynet.onnx"])])
    hu, told = smooth_hu(SHAPE), list[str]()
    expected, _ = load_runtime(random_onnx_files[0]).infer(hu)
    with (
        start_server(tmp_path / "repository") as second,
        TritonRuntime(f"ipv4:{triton_server.url},{second.url}") as runtime,
    ):
        for _ in range(VOLUMES):
            try:
                np.testing.assert_array_equal(runtime.infer(hu)[0], expected)  # of the same weights
            except ServerError as error:
                told.append(str(error))
    assert len(told) >= VOLUMES // 2  # in a round robin of two, the question after a volume goes to the other one
    for line in told:
        assert re.search(r"has changed from checkpoint \w+ .* to \w+ .* meanwhile: segment the study", line), line
        assert "\n" not in line
