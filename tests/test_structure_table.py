"""A department's table: what it says is written, what it leaves out stays, what cannot be is refused in one line."""

from pathlib import Path

import numpy as np
import pydicom
import pytest

from anatomynet.client.contours import trace_contours
from anatomynet.client.rtstruct import write_rtstruct
from anatomynet.client.structure_table import chosen_structures, load_structure_table, only_structures
from anatomynet.client.study import read_ct_series
from anatomynet.engine.errors import ModelError
from anatomynet.engine.geometry import VolumeGeometry
from anatomynet.engine.structures import STRUCTURES, structures_by_name
from anatomynet.engine.volume import LabelMap
from tests.dicom_studies import complaints, random_volume, write_study

DRAWN = ("BrainStem", "Parotid_L", "Parotid_R")
TABLE = """
[Parotid_L]
name = "Parotis links, automatisch"
label = "PAROTIS L"
colour = [1, 2, 3]
interpreted_type = "AVOIDANCE"

[BrainStem]
name = "Hirnstamm"
"""


def written_table(folder: Path, text: str = TABLE) -> Path:
    path = folder / "department.toml"
    path.write_text(text, encoding="utf-8")
    return path


def label_map(shape: tuple[int, int, int] = (4, 8, 10)) -> LabelMap:
    labels = np.zeros(shape, np.uint8)
    labels[:2, 1:4, 1:4], labels[1:3, 4:7, 2:6], labels[3, 2:6, 6:9] = 1, 2, 3
    return LabelMap(labels, VolumeGeometry(shape, (1, 1, 1)), structures_by_name(DRAWN), (0.9, 0.8, 0.7), (0, 1, 2))


def test_without_a_file_it_is_the_catalogue() -> None:
    table = load_structure_table()
    assert {n: (s.name, s.colour) for n, s in table.items()} == {
        n: (s.tg263_name, s.colour) for n, s in STRUCTURES.items()
    }


def test_the_rtstruct_carries_the_departments_words(tmp_path: Path) -> None:
    shape = (4, 8, 10)
    write_study(tmp_path / "study", random_volume(shape))
    series = read_ct_series(tmp_path / "study")
    contours = trace_contours(LabelMap(label_map(shape).labels, series.geometry, structures_by_name(DRAWN)))
    table = load_structure_table(written_table(tmp_path))
    write_rtstruct(tmp_path / "rs.dcm", series, contours, table=table)
    dataset = pydicom.dcmread(tmp_path / "rs.dcm")
    found = zip(
        dataset.StructureSetROISequence, dataset.ROIContourSequence, dataset.RTROIObservationsSequence, strict=True
    )
    assert [
        (r.ROIName, tuple(c.ROIDisplayColor), o.ROIObservationLabel, o.RTROIInterpretedType) for r, c, o in found
    ] == [
        ("Hirnstamm", STRUCTURES["BrainStem"].colour, "Hirnstamm", "ORGAN"),
        ("Parotis links, automatisch", (1, 2, 3), "PAROTIS L", "AVOIDANCE"),
        ("Parotid_R", STRUCTURES["Parotid_R"].colour, "Parotid_R", "ORGAN"),
    ]
    assert complaints("dciodvfy", tmp_path / "rs.dcm") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[Heart]\nname = 'Herz'", "Heart is no structure; expected a table .*BrainStem"),
        ("Larynx = 1", "Larynx is no structure"),
        ("[Larynx]\ncolor = [1, 2, 3]", "unknown key color; expected name, label, colour"),
        ("[Larynx]\ncolour = [1, 2, 256]", "colour is .*256.*; expected .*0 to 255"),
        ("[Larynx]\ncolour = [1, 2]", "expected .red, green, blue."),
        ("[Larynx]\nname = ''", "name is ''; expected 1 to 64"),
        ("[Larynx]\nname = 'Kehlk\u00f6pf'", "expected 1 to 64 ASCII"),
        ("[Larynx]\nname = 'a\\b'", "without a backslash"),
        ("[Larynx]\nlabel = '12345678901234567'", "expected 1 to 16"),
        ("[Larynx]\ninterpreted_type = 'EYE'", "interpreted_type is 'EYE'; expected one of ORGAN"),
        ("[Larynx]\ninterpreted_type = [1]", "expected one of ORGAN"),
        ("[Larynx]\nname = 'brainstem'", "BrainStem and Larynx are both called"),
        ("[Larynx", "is not TOML"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as refusal:
        load_structure_table(written_table(tmp_path, text))
    assert "department.toml" in str(refusal.value)
    with pytest.raises(ModelError, match="cannot be read"):
        load_structure_table(tmp_path / "none.toml")


def test_structures_are_chosen_by_any_of_their_names(tmp_path: Path) -> None:
    table = load_structure_table(written_table(tmp_path))
    for names in (
        ["Parotid_L", "BrainStem"],
        ["hirnstamm", " LT PAROTID "],
        ["Parotis links, automatisch", "Brainstem"],
    ):
        assert [s.name for s in chosen_structures(names, DRAWN, table)] == ["BrainStem", "Parotid_L"]
    for unknown in ("Heart", "", "Larynx"):  # the last is known, but not to this model
        with pytest.raises(ModelError, match=f"unknown structure '{unknown}'; expected names from BrainStem, Par"):
            chosen_structures([unknown], DRAWN, table)


def test_the_others_become_background() -> None:
    whole = label_map()
    part = only_structures(whole, structures_by_name(("Parotid_R", "BrainStem")))
    np.testing.assert_array_equal(part.labels == 1, whole.labels == 3)
    np.testing.assert_array_equal(part.labels == 2, whole.labels == 1)
    assert part.labels.max() == 2
    assert (part.confidence, part.stray_ml) == ((0.7, 0.9), (2, 0))
    np.testing.assert_array_equal(only_structures(whole, whole.structures).labels, whole.labels)
