"""segment_study does what its docstring says, and what the command does."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from anatomynet.client import SegmentedStudy, SegmentOptions, ServerOptions, segment_studies, segment_study
from anatomynet.client.triton import TritonRuntime
from anatomynet.engine.config import ModelConfig
from anatomynet.engine.errors import AnatomyNetError, GeometryError, ModelError, OutputError, ServerError, StudyError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.runtime import Runtime, load_runtime
from anatomynet.engine.volume import CTVolume, HounsfieldArray
from tests.dicom_studies import DIRECTIONS, edit, write_study
from tests.random_network import smooth_hu
from tests.triton_servers import RunningServer, free_ports

SHAPE = (24, 96, 128)
CLIENT = [sys.executable, "-c", "from anatomynet.client.cli import main; main()"]
# Differ each time: identifiers, and the clock.
CHANGING = {"SOPInstanceUID", "SeriesInstanceUID", "DimensionOrganizationUID", "ContributionDateTime"}
CHANGING |= {
    f"{of}{what}" for of in ("InstanceCreation", "StructureSet", "Content", "Series") for what in ("Date", "Time")
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "study"
    geometry = VolumeGeometry(SHAPE, (1.0, 1.0, 2.5), (-60.0, -50.0, -30.0), DIRECTIONS["HFS"])
    write_study(folder, CTVolume(smooth_hu(SHAPE), geometry))
    return folder


class Watched:
    """The embedded engine, and what was there whenever it was asked."""

    def __init__(self, runtime: Runtime, told: list[str]) -> None:
        self._runtime = runtime
        self._told = told
        self.told_before: list[list[str]] = []

    @property
    def model(self) -> ModelConfig:
        return self._runtime.model

    @property
    def description(self) -> str:
        return self._runtime.description

    def infer(self, hu: HounsfieldArray) -> Any:
        self.told_before.append(list(self._told))
        return self._runtime.infer(hu)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def embedded(random_onnx_files: tuple[Path, Path], told: list[str]) -> Watched:
    return Watched(load_runtime(random_onnx_files[0]), told)


def comparable(path: Path) -> Dataset:
    """A DICOM file without what differs each time."""
    dataset = pydicom.dcmread(path)

    def drop(holder: Dataset, element: pydicom.DataElement) -> None:
        if element.keyword in CHANGING:
            del holder[element.tag]

    dataset.walk(drop)
    return dataset


def test_it_does_what_the_command_does(study: Path, triton_server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "table.toml").write_text("[Parotid_L]\nname = 'Ohrspeichel li'\n")
    names = ("Parotid_L", "Bone_Mandible", "SpinalCord")
    common: dict[str, Any] = {"structures": names, "structure_table": tmp_path / "table.toml", "tolerance_mm": 0.4}
    for by in ("api", "command"):
        (tmp_path / by).mkdir()
    options = SegmentOptions(
        server=ServerOptions(urls=(triton_server.url,)),
        output=tmp_path / "api" / "x.rtstruct.dcm",
        output_types=("rtstruct", "seg", "nifti"),
        report=tmp_path / "api" / "report.json",
        picture=tmp_path / "api" / "picture.png",
        review=tmp_path / "api" / "review.html",
        **common,
    )
    result = segment_study(str(study), options)
    arguments: list[str | Path] = ["--url", triton_server.url, "--structures", ",".join(names), "--tolerance-mm", "0.4"]
    arguments += ["--structure-table", tmp_path / "table.toml", "--output-type", "rtstruct,seg,nifti"]
    for option, name in (("output", "x.rtstruct.dcm"), ("report", "report.json"), ("picture", "picture.png")):
        arguments += [f"--{option}", tmp_path / "command" / name]
    arguments += ["--review", tmp_path / "command" / "review.html"]
    run = subprocess.run([*CLIENT, "segment", study, *arguments], capture_output=True, text=True, check=True)
    api, command = tmp_path / "api", tmp_path / "command"
    assert [path.name for path in sorted(api.iterdir())] == [path.name for path in sorted(command.iterdir())]
    assert {path.name for path in result.outputs.values()} <= {path.name for path in api.iterdir()}
    for name in ("x.rtstruct.dcm", "x.seg.dcm"):
        assert comparable(api / name) == comparable(command / name), name
    for name in ("x.nii.gz", "x.labels.tsv", "picture.png", "review.html"):
        assert (api / name).read_bytes() == (command / name).read_bytes(), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (api, command)]
    assert [set(report.pop("seconds")) for report in reports] == [set(result.clock.seconds)] * 2
    assert reports[0] == reports[1]
    assert {s["name"] for s in reports[0]["structures"]} == {"Parotid_L", "Bone_Mandible", "SpinalCord"}
    assert result.runtime in run.stdout


def test_what_it_returns_is_what_it_wrote(study: Path, embedded: Watched, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    options = SegmentOptions(output=tmp_path / "map.nii.gz", output_types=("nifti",))
    result = segment_study(study, options, runtime=embedded)
    assert isinstance(result, SegmentedStudy)
    drawing = result.drawing
    np.testing.assert_array_equal(drawing.volume.hu, smooth_hu(SHAPE))
    assert drawing.label_map.geometry == drawing.volume.geometry == drawing.series.geometry
    written = np.asarray(nibabel.load(tmp_path / "map.nii.gz").dataobj)
    np.testing.assert_array_equal(np.bincount(written.ravel()), np.bincount(drawing.label_map.labels.ravel()))
    assert [region.voxels for region in drawing.regions] == [
        np.count_nonzero(drawing.label_map.labels == label) for label, _ in enumerate(drawing.regions, start=1)
    ]
    assert result.outputs == {"nifti": tmp_path / "map.nii.gz"}
    assert result.runtime.startswith("openkbp7, checkpoint 5eed5eed5eed, ")
    assert list(result.clock.seconds) == ["connect", "read", "infer", "check", "write"]


@pytest.mark.parametrize("kind", ["a folder", "text", "a zip", "a DICOMDIR"])
def test_a_study_is_whatever_the_command_takes(study: Path, embedded: Watched, tmp_path: Path, kind: str) -> None:
    given: Path | str = tmp_path / "study"
    (tmp_path / "study").symlink_to(study)
    if kind == "text":
        given = str(given)
    elif kind == "a zip":
        given = tmp_path / "study.zip"
        with zipfile.ZipFile(given, "w") as archive:
            for path in study.iterdir():
                archive.write(path, f"CT/{path.name}")
    elif kind == "a DICOMDIR":
        (tmp_path / "media").mkdir()
        for path in study.iterdir():
            (tmp_path / "media" / path.name).symlink_to(path)
        given = tmp_path / "media" / "DICOMDIR"
        given.write_bytes(bytes(132))
    result = segment_study(given, SegmentOptions(output=tmp_path / "rs.dcm"), runtime=embedded)
    assert len(result.drawing.series.slices) == SHAPE[0]
    assert pydicom.dcmread(tmp_path / "rs.dcm").Modality == "RTSTRUCT"


def test_without_a_name_the_file_lies_beside_the_study(study: Path, embedded: Watched) -> None:
    result = segment_study(study, runtime=embedded)
    assert result.outputs == {"rtstruct": study.with_name("study.rtstruct.dcm")}
    assert result.outputs["rtstruct"].is_file()


def test_what_was_read_is_told_before_it_is_drawn(
    study: Path, embedded: Watched, told: list[str], tmp_path: Path
) -> None:
    segment_study(study, SegmentOptions(output=tmp_path / "rs.dcm"), runtime=embedded, announce=told.append)
    (line,) = told
    assert line == f"{SHAPE[0]} slices; openkbp7, checkpoint 5eed5eed5eed, {embedded.description}"
    assert embedded.told_before == [told]


def test_a_runtime_stays_open_over_several_calls(study: Path, triton_server: RunningServer, tmp_path: Path) -> None:
    """And what else was asked for is not looked for: nobody is at that address."""
    nobody = ServerOptions(urls=(f"127.0.0.1:{free_ports(1)[0]}",))
    with TritonRuntime(triton_server.url) as runtime:
        drawn = [
            segment_study(study, SegmentOptions(server=nobody, output=tmp_path / name), runtime=runtime).drawing
            for name in ("one.dcm", "two.dcm")
        ]
        assert connections_to(triton_server.grpc_port) > 0
        runtime.infer(smooth_hu((8, 32, 32)))
    np.testing.assert_array_equal(drawn[0].label_map.labels, drawn[1].label_map.labels)
    assert comparable(tmp_path / "one.dcm") == comparable(tmp_path / "two.dcm")


def test_a_connection_of_its_own_is_closed(study: Path, triton_server: RunningServer, tmp_path: Path) -> None:
    before = connections_to(triton_server.grpc_port)
    server = ServerOptions(urls=(triton_server.url,))
    segment_study(study, SegmentOptions(server=server, output=tmp_path / "rs.dcm"))
    with pytest.raises(StudyError):
        segment_study(tmp_path / "nowhere", SegmentOptions(server=server))
    assert connections_to(triton_server.grpc_port) == before


def connections_to(port: int) -> int:
    """Open connections of this machine to a port of it."""
    paths = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]  # the second where the kernel knows IPv6
    tables = [path.read_text().splitlines()[1:] for path in paths if path.exists()]
    rows = [line.split() for table in tables for line in table]
    return sum(row[2].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


def test_wrong_options_are_refused_before_any_work(
    study: Path, embedded: Watched, told: list[str], tmp_path: Path
) -> None:
    there = tmp_path / "there"
    there.write_text("a physician's work")
    (tmp_path / "table.toml").write_text("[Parotid_L]\ncolour = 'red'\n")
    cases: list[tuple[type[AnatomyNetError], str, dict[str, Any]]] = [
        (OutputError, "exists and was kept", {"output": there}),
        (OutputError, "exists and was kept", {"report": there}),
        (OutputError, "exists and was kept", {"picture": there}),
        (OutputError, "exists and was kept", {"review": there}),
        (OutputError, "folder does not exist", {"output": tmp_path / "no" / "rs.dcm"}),
        (OutputError, "unknown output type 'stl'", {"output_types": ("rtstruct", "stl")}),
        (OutputError, "tolerance of -1 mm; expected 0 or more", {"tolerance_mm": -1}),
        (OutputError, "tolerance of nan mm", {"tolerance_mm": float("nan")}),
        (ModelError, "unknown structure 'Liver'", {"structures": ("Liver",)}),
        (ModelError, "table.toml", {"structure_table": tmp_path / "table.toml"}),
    ]
    before = sorted(tmp_path.iterdir())
    for error, message, values in cases:
        values.setdefault("output", tmp_path / "rs.dcm")
        with pytest.raises(error, match=message):
            segment_study(study, SegmentOptions(**values), runtime=embedded, announce=told.append)
    assert (told, embedded.told_before) == ([], [])
    assert sorted(tmp_path.iterdir()) == before
    assert there.read_text() == "a physician's work"
    with pytest.raises(OutputError, match="tolerance of -1"):
        segment_studies([study], SegmentOptions(tolerance_mm=-1), runtime=embedded)


def test_a_file_that_is_there_is_replaced_when_it_may_be(study: Path, embedded: Watched, tmp_path: Path) -> None:
    files: dict[str, Any] = {name: tmp_path / name for name in ("output", "report", "picture", "review")}
    for path in files.values():
        path.write_text("older")
    segment_study(study, SegmentOptions(overwrite=True, **files), runtime=embedded)
    assert all(b"older" not in path.read_bytes()[:5] for path in files.values())


def test_errors_are_those_that_it_names(study: Path, embedded: Watched, tmp_path: Path) -> None:
    options = SegmentOptions(output=tmp_path / "rs.dcm")
    with pytest.raises(StudyError, match="does not exist"):
        segment_study(tmp_path / "nowhere", options, runtime=embedded)
    with pytest.raises(StudyError, match="0 CT series end in 4711"):
        segment_study(study, SegmentOptions(output=tmp_path / "rs.dcm", series="4711"), runtime=embedded)
    nobody = ServerOptions(urls=(f"127.0.0.1:{free_ports(1)[0]}",))
    with pytest.raises(ServerError, match="no Triton server at"):
        segment_study(study, SegmentOptions(output=tmp_path / "rs.dcm", server=nobody))
    for path in write_study(tmp_path / "tilted"):
        edit(path, GantryDetectorTilt=5)
    with pytest.raises(GeometryError, match="GantryDetectorTilt"):
        segment_study(tmp_path / "tilted", options, runtime=embedded)
    assert not (tmp_path / "rs.dcm").exists()
    assert embedded.told_before == []
