"""What several tests share: a model with random weights, a real tritonserver that serves it, a small study."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import pytest

from anatomynet.client.ct_writer import write_ct_series
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.volume import CTVolume
from tests.triton_servers import RunningServer, ServerStarter, has_server, running_server

# Without a GPU Triton's compiler interprets, if it is told so before anything imports it, and torch._dynamo does.
if find_spec("triton") and find_spec("torch"):
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch's sums are in one order, so that runs can be compared bit by bit."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_model_config() -> ModelConfig:
    """Of the model with random weights; stride 4."""
    pytest.importorskip("torch", reason="random weights need PyTorch")
    from tests.random_network import random_config

    return random_config()


@pytest.fixture(scope="session")
def random_onnx_files(random_model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The served model with random weights, which draws every structure: in FP32, and in FP16."""
    from anatomynet.export.onnx import served_model, write_onnx
    from tests.random_network import random_graph

    folder = tmp_path_factory.mktemp("onnx")
    files = (folder / "anatomynet.onnx", folder / "anatomynet_fp16.onnx")
    for file in files:
        write_onnx(served_model(random_graph(), random_model_config, fp16="fp16" in file.stem), file)
    return files


@pytest.fixture(scope="session")
def random_repository(
    random_model_config: ModelConfig,
    random_onnx_files: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A Triton model repository with that model."""
    from anatomynet.export.repository import write_repository
    from anatomynet.export.triton_models import python_model

    folder = tmp_path_factory.mktemp("triton") / "triton_repo"
    write_repository(folder, [python_model(random_model_config, random_onnx_files)])
    return folder


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> ServerStarter:
    """`with start_server(repository, "--option=value", ...) as server`: see triton_servers.running_server."""
    if not has_server():
        pytest.skip("no tritonserver here: pip install 'anatomynet[serve]'")

    def start(repository: Path, *options: str) -> AbstractContextManager[RunningServer]:
        return running_server(repository, *options, folder=tmp_path_factory.mktemp("server"))

    return start


@pytest.fixture(scope="session")
def triton_server(start_server: ServerStarter, random_repository: Path) -> Iterator[RunningServer]:
    """The random model, served for the whole session: leave it as it was."""
    with start_server(random_repository) as server:
        yield server


@pytest.fixture(scope="session")
def small_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom on a coarse grid that is told as a fine one, so that nothing is resampled: 40 x 104 x 104."""
    folder = tmp_path_factory.mktemp("small_study") / "study"
    volume, _ = make_phantom(VolumeGeometry((40, 104, 104), (4.8, 4.8, 8.9)))
    write_ct_series(folder, CTVolume(volume.hu, VolumeGeometry((40, 104, 104), (1.0, 1.0, 2.5))))
    return folder
