"""Nothing private leaves: what goes to the real server, what lies in shared memory, and what is told to a person."""

import base64
import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import pytest
from google.protobuf.message import DecodeError

from anatomynet.client import SegmentOptions, ServerOptions, segment_study
from anatomynet.client.shared_memory import REGION_PREFIX, SHARED_MEMORY_FOLDER
from anatomynet.client.study import read_ct_series, volume_from_series
from anatomynet.engine.errors import AnatomyNetError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.volume import CTVolume
from tests.dicom_studies import DIRECTIONS, edit, words_of_patient, write_study
from tests.random_network import smooth_hu
from tests.test_study import REFUSALS
from tests.triton_servers import RunningServer
from tests.wire import forms_of, grpc_headers, recorded, traces

service = pytest.importorskip("tritonclient.grpc.service_pb2")

SHAPE = (24, 96, 128)
PRIVATE = {
    "PatientName": "M\u00fcller-L\u00fcdenscheidt^J\u00f6rg",
    "PatientID": "PID-4711-XYZ",
    "PatientBirthDate": "19610102",
    "AccessionNumber": "ACC-998877",
    "ReferringPhysicianName": "Geheimrat^Zacharias",
    "StudyID": "STUDY-5544",
    "StudyDescription": "Zungengrundkarzinom",
    "InstitutionName": "Klinikum Hinterwald",
}
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
# What may be asked, and its input: the second finds the box in which the first draws.
MODELS = {"anatomynet": "CT", "anatomynet_region": "CT_COARSE"}
# Of a UID, where only its last digits may be told.
TAIL_LENGTH = 8
ALLOWED_HEADERS = {":path", "user-agent", "grpc-accept-encoding", "accept-encoding", "grpc-timeout", "te"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "Mueller-Luedenscheidt"  # people call folders so
    geometry = VolumeGeometry(SHAPE, (1.0, 1.0, 2.5), (-60.0, -50.0, -30.0), DIRECTIONS["HFS"])
    for path in write_study(folder, CTVolume(smooth_hu(SHAPE), geometry), SpecificCharacterSet="ISO_IR 192"):
        edit(path, **PRIVATE)
    return folder


@pytest.fixture(scope="module")
def secrets(study: Path) -> list[str]:
    """Whatever names the patient, the study or its files."""
    found = {study.name, *PRIVATE.values()}
    for path in sorted(study.iterdir())[:2]:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        found |= {path.name, *(str(dataset[keyword].value)[-2 * TAIL_LENGTH :] for keyword in UIDS)}
    parts = {part for text in found for part in re.split(r"[\^\-\s.]", text) if len(part) >= 5}
    return sorted(found | parts - {"STUDY"})  # which is a word of DICOM too


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What a program that uses the package, and writes down all that any library logs, would write down."""
    caplog.set_level(logging.DEBUG)
    return caplog


def segmented(study: Path, output: Path, port: int, shared_memory: Literal["on", "off"] = "off") -> None:
    options = SegmentOptions(
        server=ServerOptions(urls=(f"127.0.0.1:{port}",), shared_memory=shared_memory), output=output
    )
    assert segment_study(study, options).drawing.label_map.labels.any()


def infer_requests(messages: list[bytes]) -> Iterator[Any]:
    """The requests for the model among a client's messages; others parse as such too, but have no input."""
    for message in messages:
        request = service.ModelInferRequest()
        with suppress(DecodeError):
            request.ParseFromString(message)
            if request.inputs:
                yield request


def filled(message: Any) -> set[str]:
    return {descriptor.name for descriptor, _ in message.ListFields()}


def test_what_is_written_down_would_be_found() -> None:
    for secret in PRIVATE.values():
        assert len(forms_of(secret)) > 40
        assert all(traces([secret], b"\0" * 7 + data + b"\0") for data in forms_of(secret))
    sentence = base64.b64encode(b"{name: Zacharias, sex: O}")
    assert traces(["Zacharias"], sentence)
    assert traces(["19610102"], b"born 02.01.1961")
    assert traces(["Zacharias"], b"dear Zacharias,")
    assert not traces(PRIVATE.values(), bytes(range(256)) * 8)


def test_only_voxels_and_the_models_name_go_to_a_server(
    study: Path, secrets: list[str], triton_server: RunningServer, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    with recorded(triton_server.grpc_port) as (port, recording):
        segmented(study, tmp_path / "rs.dcm", port)
    requests = {request.model_name: request for request in infer_requests(recording.messages())}
    assert {"anatomynet"} <= requests.keys() <= MODELS.keys()
    for name, request in requests.items():
        assert filled(request) == {"model_name", "parameters", "inputs", "outputs", "raw_input_contents"}
        assert list(request.parameters) == ["timeout"]
        (ct,) = request.inputs
        assert (filled(ct), ct.name, ct.datatype) == ({"name", "datatype", "shape"}, MODELS[name], "INT16")
        assert {output.name for output in request.outputs} <= {"LABEL_MAP", "CONFIDENCE", "BOX"}
    (ct,) = requests["anatomynet"].inputs
    (sent,) = requests["anatomynet"].raw_input_contents
    assert is_part_of(np.frombuffer(sent, np.int16).reshape(ct.shape), smooth_hu(SHAPE))
    assert traces(secrets, recording.everything) == []
    assert traces(secrets, log.text.encode()) == []


def is_part_of(box: Any, hu: Any) -> bool:
    """Whether a box is cut out of a volume."""
    starts = np.argwhere(
        hu[tuple(slice(0, n - m + 1) for n, m in zip(hu.shape, box.shape, strict=True))] == box[0, 0, 0]
    )
    return any(
        np.array_equal(hu[tuple(slice(i, i + n) for i, n in zip(start, box.shape, strict=True))], box)
        for start in starts
    )


def test_shared_memory_holds_voxels_and_nothing_else(
    study: Path, secrets: list[str], triton_server: RunningServer, tmp_path: Path
) -> None:
    seen: list[bytes] = []
    with recorded(triton_server.grpc_port, lambda: seen.extend(shared_regions())) as (port, recording):
        segmented(study, tmp_path / "rs.dcm", port, shared_memory="on")
    (request,) = (r for r in infer_requests(recording.messages()) if r.model_name == "anatomynet")
    (ct,) = request.inputs
    shape = tuple(ct.shape)
    size = 2 * int(np.prod(shape))
    assert not request.raw_input_contents
    assert {*request.parameters, *ct.parameters} <= {
        "timeout",
        "shared_memory_region",
        "shared_memory_byte_size",
        "shared_memory_offset",
    }
    assert re.fullmatch(rf"{REGION_PREFIX}\d+-[0-9a-f]{{16}}", ct.parameters["shared_memory_region"].string_param)
    assert traces(secrets, recording.everything) == []
    asked = [region for region in seen if any(region[:size])]
    assert asked
    # The voxels; then the label map, which is empty or drawn.
    *earlier, whole = (np.frombuffer(region, np.int16, size // 2) for region in asked)
    assert is_part_of(whole.reshape(shape), smooth_hu(SHAPE))
    for part in earlier:  # seen while it was written, zeros may follow
        assert np.array_equal(part, np.where(part == 0, 0, whole))
    for region in asked:
        assert max(region[size : size + size // 2]) <= 7
        assert len(region) == size + size // 2


def shared_regions() -> Iterator[bytes]:
    """What lies in this process' shared memory: files without a name, open as long as the server may read them."""
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
            is_region = target.startswith(f"{SHARED_MEMORY_FOLDER}/{REGION_PREFIX}")
            held = os.pread(int(link.name), link.stat().st_size, 0) if is_region else None
        except OSError:  # the descriptor that lists them, or one that was closed meanwhile
            continue
        if held is not None:
            yield held


def test_headers_of_calls_say_nothing(
    study: Path, secrets: list[str], triton_server: RunningServer, tmp_path: Path
) -> None:
    with grpc_headers(triton_server.grpc_port) as (port, headers):
        segmented(study, tmp_path / "rs.dcm", port)
    assert {name for name, _ in headers} <= ALLOWED_HEADERS
    assert (":path", "/inference.GRPCInferenceService/ModelInfer") in headers
    assert traces(secrets, "\n".join(f"{name}: {value!r}" for name, value in headers).encode()) == []


def test_log_report_and_table_say_nothing(
    study: Path, secrets: list[str], triton_server: RunningServer, tmp_path: Path
) -> None:
    """The folder is called as the user calls it, in the table of studies too; here it is another."""
    plain = tmp_path / "study"
    plain.symlink_to(study)
    command = [sys.executable, "-c", "from anatomynet.client.cli import main; main()", "segment", str(plain)]
    command += ["--url", triton_server.url]
    single = [*command, "--output", str(tmp_path / "rs.dcm"), "--report", str(tmp_path / "report.json")]
    single += ["--review", str(tmp_path / "review.html"), "--picture", str(tmp_path / "picture.png")]
    many = [*command, "--all-series", "--output-folder", str(tmp_path / "many")]
    (tmp_path / "many").mkdir()
    told = b"".join(
        run.stdout + run.stderr for run in (subprocess.run(c, capture_output=True, check=True) for c in (single, many))
    )
    files = [tmp_path / "report.json", tmp_path / "many" / "anatomynet-segment.csv"]
    assert json.loads(files[0].read_text())["model"]
    told += b"".join(path.read_bytes() for path in files)
    told += b"".join(str(path.relative_to(tmp_path)).encode() for path in tmp_path.rglob("*"))
    names = [secret for secret in secrets if not secret.startswith("CT0")]  # a slice's file may be named
    assert traces(names, told) == []
    page = (tmp_path / "review.html").read_bytes()
    assert traces(names, page) == []
    picture = (tmp_path / "picture.png").read_bytes()
    assert traces(names, picture + unpacked_chunks(picture)) == []


def unpacked_chunks(png: bytes) -> bytes:
    """The texts that a PNG may hold, packed or not."""
    found = b""
    for match in re.finditer(rb"zTXt|iTXt|tEXt|eXIf", png):
        length = int.from_bytes(png[match.start() - 4 : match.start()], "big")
        chunk = png[match.end() : match.end() + length]
        found += chunk
        for start in (m.start() for m in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", chunk)):
            try:
                found += zlib.decompress(chunk[start:])
            except zlib.error:
                continue
    return found


def test_no_library_logs_a_value_that_dicom_does_not_allow(
    tmp_path: Path, triton_server: RunningServer, log: pytest.LogCaptureFixture
) -> None:
    """pydicom logs such values, where it is let to look at them."""
    pytest.importorskip("highdicom")
    geometry = VolumeGeometry(SHAPE, (1.0, 1.0, 2.5), (-60.0, -50.0, -30.0), DIRECTIONS["HFS"])
    for path in write_study(
        tmp_path / "study", CTVolume(smooth_hu(SHAPE), geometry), SpecificCharacterSet="ISO_IR 192"
    ):
        path.write_bytes(path.read_bytes().replace(b"19610102", b"1961.1.2").replace(b"Meier^", b"M\xfcler^"))
    log.clear()
    options = SegmentOptions(
        server=ServerOptions(urls=(triton_server.url,)),
        output_types=("rtstruct", "seg", "nifti"),
        review=tmp_path / "r",
    )
    segment_study(tmp_path / "study", options)
    assert traces(["1961.1.2", "Secret", "PID4711"], log.text.encode()) == []


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of the invalid values that the tests write
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_the_last_digits_of_a_uid_at_most(tmp_path: Path, case: str) -> None:
    damage, error, _ = REFUSALS[case]
    paths = write_study(tmp_path / "study", SpecificCharacterSet="ISO_IR 192")
    for path in paths:
        edit(path, **PRIVATE)
    uids = {str(pydicom.dcmread(path, stop_before_pixels=True)[keyword].value) for path in paths for keyword in UIDS}
    damage(tmp_path / "study", paths)
    with pytest.raises(error) as refusal:
        volume_from_series(read_ct_series(tmp_path / "study"))
    assert isinstance(refusal.value, AnatomyNetError)
    told = str(refusal.value).encode()
    assert traces([*PRIVATE.values(), *words_of_patient(), *(uid[-TAIL_LENGTH - 1 :] for uid in uids)], told) == []


def test_an_object_says_nothing_when_it_is_shown(study: Path, secrets: list[str], tmp_path: Path) -> None:
    """What a traceback or a debugger's log would show."""
    series = read_ct_series(study)
    shown = repr(dataclasses.replace(series, slices=())).encode()
    assert traces([s for s in secrets if s in PRIVATE.values()], shown) == []


def test_onnx_runtime_sends_nothing_home(tmp_path: Path) -> None:
    """It reports its models' names, inputs and speed to its maker from 1.29 on, unless it is told not to."""
    command = (
        "from anatomynet.engine.config import shipped_weights; from anatomynet.engine.runtime import OnnxRuntime; "
        "import numpy as np; OnnxRuntime(shipped_weights('.onnx')).infer(np.zeros((16, 64, 64), np.int16))"
    )
    # No variable of CI, in which it is silent anyway.
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", command], check=True, env=environment)
    assert not list(tmp_path.iterdir())  # an identifier of the machine, and a queue of what is to be sent
