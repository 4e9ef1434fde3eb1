"""Two real servers, one of them on a machine with little memory left: it refuses a study, which the other one draws."""

import random
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anatomynet.client import pipeline
from anatomynet.client.connection import ServerOptions
from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.errors import ServerError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.runtime import load_runtime
from anatomynet.engine.volume import CTVolume
from tests.random_network import smooth_hu
from tests.triton_servers import LAUNCHER, RunningServer, has_server, running_server

pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.skipif(not has_server(), reason="no tritonserver here: pip install 'anatomynet[serve]'")

# Enough for the warm-up, 64 x 256 x 256 at 32 bytes a voxel; what is held for that counts again for the next volume.
FREE_KB = 135_000
SMALL, LARGE = (24, 96, 128), (72, 352, 352)
# Random weights draw much; the servers have no region finder.
ONE_STRUCTURE: dict[str, Any] = {"structures": ("BrainStem",), "whole_volume": True}


@pytest.fixture(scope="module")
def poor_server(random_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Finds FREE_KB in its /proc/meminfo, as on a machine that other programs fill."""
    folder = tmp_path_factory.mktemp("poor")
    (folder / "meminfo").write_text(f"MemTotal: 16000000 kB\nMemAvailable: {FREE_KB} kB\n")
    alone, bind = "unshare --map-root-user --mount", f"mount --bind {folder / 'meminfo'} /proc/meminfo"
    if subprocess.run([*alone.split(), "sh", "-c", bind], capture_output=True, check=False).returncode:
        pytest.skip("another /proc/meminfo takes a mount namespace")
    become = f'{bind} && exec {LAUNCHER} --model-repository="$ANATOMYNET_REPOSITORY" "$@"'
    program = folder / "poor"
    program.write_text(f'#!/bin/sh\nexec {alone} sh -c {shlex.quote(become)} sh "$@"\n')
    program.chmod(0o755)
    with running_server(random_repository, folder=folder, program=program) as server:
        yield server


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    coarse = np.random.default_rng(1808).integers(-200, 1000, [side // 8 for side in LARGE], dtype=np.int16)
    hu = coarse.repeat(8, 0).repeat(8, 1).repeat(8, 2)
    folder = tmp_path_factory.mktemp("study") / "study"
    write_ct_series(folder, CTVolume(hu, VolumeGeometry(LARGE, (1.0, 1.0, 2.5))))
    return folder


def test_alone_it_refuses_in_one_line_and_serves_on(poor_server: RunningServer, study: Path, tmp_path: Path) -> None:
    options = pipeline.SegmentOptions(server=ServerOptions(urls=(poor_server.url,)), output=tmp_path / "rs.dcm")
    with pytest.raises(ServerError, match=r"GB of memory, found 0\.\d GB free") as caught:
        pipeline.segment_study(study, options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    with TritonRuntime(poor_server.url) as runtime:
        assert runtime.infer(smooth_hu(SMALL))[0].shape == SMALL


def test_the_study_is_drawn_by_the_server_that_has_the_memory(
    poor_server: RunningServer,
    triton_server: RunningServer,
    random_onnx_files: tuple[Path, Path],
    study: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(random, "randrange", lambda stop: 0)  # the first one is asked first
    server = ServerOptions(urls=(poor_server.url, triton_server.url), tell=told.append)
    options = pipeline.SegmentOptions(server=server, output=tmp_path / "rs.dcm", **ONE_STRUCTURE)
    found = pipeline.segment_study(study, options).drawing.label_map.labels
    assert (tmp_path / "rs.dcm").is_file()
    assert len(told) == 1
    assert told[0].startswith(f"{poor_server.url}: CT of {LARGE} voxels (z, y, x) takes about 0.3 GB of memory")
    assert told[0].endswith("going on to the next server")
    options = replace(options, output=tmp_path / "embedded.dcm")
    expected = pipeline.segment_study(study, options, runtime=load_runtime(random_onnx_files[0]))
    assert found.any()
    np.testing.assert_array_equal(found, expected.drawing.label_map.labels)
