"""A structure that no patient taught is left out, and said to be; drawn only when asked for, and then marked."""

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pydicom
import pytest
from click.testing import CliRunner

from anatomynet.client import SegmentOptions, segment_study
from anatomynet.client.cli import main
from anatomynet.client.ct_writer import write_ct_series
from anatomynet.client.unvalidated import WARNING
from anatomynet.engine.config import model_config_from_json, shipped_weights
from anatomynet.engine.contract import METADATA_KEY
from anatomynet.engine.errors import ModelError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.phantom import make_phantom
from anatomynet.engine.runtime import OpenVinoRuntime

UNTAUGHT = ("Parotid_R", "Parotid_L")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unvalidated") / "study"
    write_ct_series(folder, make_phantom(VolumeGeometry((64, 256, 256), (1.0, 1.0, 3.0)))[0])
    return folder


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> OpenVinoRuntime:
    """The shipped model, as if the parotids had been learnt from phantoms alone."""
    model = onnx.load(shipped_weights(".onnx"))
    (metadata,) = (entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    config = model_config_from_json(metadata.value)
    metadata.value = replace(
        config, patients=tuple(0 if name in UNTAUGHT else 9 for name in config.structures)
    ).to_json()
    path = tmp_path_factory.mktemp("unvalidated") / "model.onnx"
    onnx.save(model, path)
    return OpenVinoRuntime(path)


def test_it_is_left_out_with_a_note(study: Path, runtime: OpenVinoRuntime, tmp_path: Path) -> None:
    options = SegmentOptions(output=tmp_path / "rs.dcm", report=tmp_path / "report.json", whole_volume=True)
    result = segment_study(study, options, runtime=runtime)
    rois = pydicom.dcmread(tmp_path / "rs.dcm").StructureSetROISequence
    names = [roi.ROIName for roi in rois]
    assert "Bone_Mandible" in names
    assert not set(UNTAUGHT) & set(names)
    (note,) = result.drawing.label_map.notes
    assert note.startswith("left out: Parotid_R, Parotid_L, ")
    assert all(note in roi.ROIDescription for roi in rois)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["notes"] == [note]
    assert not [found for found in report["findings"] if found["text"] == WARNING]


def test_it_is_marked_where_it_is_allowed(study: Path, runtime: OpenVinoRuntime, tmp_path: Path) -> None:
    options = SegmentOptions(
        output=tmp_path / "rs.dcm",
        output_types=("rtstruct", "seg"),
        report=tmp_path / "report.json",
        allow_unvalidated=True,
        whole_volume=True,
    )
    segment_study(study, options, runtime=runtime)
    rois = {
        r.ROIName: r.get("ROIDescription", "") for r in pydicom.dcmread(tmp_path / "rs.dcm").StructureSetROISequence
    }
    segments = {
        s.SegmentLabel: s.get("SegmentDescription", "")
        for s in pydicom.dcmread(tmp_path / "rs.seg.dcm").SegmentSequence
    }
    for written in (rois, segments):
        assert {name for name, description in written.items() if WARNING in description} == set(UNTAUGHT)
        assert "Bone_Mandible" in written
    report = json.loads((tmp_path / "report.json").read_text())
    assert {f["structure"] for f in report["findings"] if f["text"] == WARNING} == set(UNTAUGHT)
    assert report["notes"] == []


def test_nothing_else_to_draw_is_refused_before_any_work(study: Path, runtime: OpenVinoRuntime, tmp_path: Path) -> None:
    options = SegmentOptions(output=tmp_path / "rs.dcm", structures=("Parotid_L",))
    with pytest.raises(ModelError, match=r"Parotid_L: no patient's contours taught openkbp7 .*--allow-unvalidated"):
        segment_study(study, options, runtime=runtime)
    assert list(tmp_path.iterdir()) == []


def test_the_shipped_checkpoint_was_taught_by_patients(study: Path, tmp_path: Path) -> None:
    files = [tmp_path / "without.dcm", tmp_path / "with.dcm"]
    for file, options in zip(files, ([], ["--allow-unvalidated"]), strict=True):
        result = CliRunner().invoke(main, ["segment", str(study), "--output", str(file), *options])
        assert result.exit_code == 0, result.output
        assert "no patient" not in result.output
    one, other = (pydicom.dcmread(file) for file in files)
    assert one.ROIContourSequence == other.ROIContourSequence
