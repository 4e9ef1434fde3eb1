"""ROI names: what departments write is understood, and nothing that is another structure."""

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anatomynet.engine.aliases import load_aliases, structure_from_roi_name
from anatomynet.engine.errors import ModelError
from anatomynet.engine.structures import STRUCTURES, Structure


@pytest.mark.parametrize(
    ("roi_name", "structure"),
    [
        ("Parotid Lt", "Parotid_L"),
        ("LT PAROTID", "Parotid_L"),
        ("Parotid_L", "Parotid_L"),
        ("parotidL", "Parotid_L"),
        ("Left parotid gland", "Parotid_L"),
        ("Parotis rechts", "Parotid_R"),
        ("R_Parotid", "Parotid_R"),
        ("Rt Sub-Mandibular Gland", "Submandibular_R"),
        ("Glnd_Submand_L", "Submandibular_L"),
        ("SMG_R", "Submandibular_R"),
        ("Submandib Gland Lt", "Submandibular_L"),
        ("OptNrv_L", "OpticNerve_L"),
        ("Opt Chiasm", "Chiasm"),
        ("Parotid Glnd Rt", "Parotid_R"),
        ("OPTIC NERVE RT", "OpticNerve_R"),
        ("OpticNrv_L", "OpticNerve_L"),
        ("ON L", "OpticNerve_L"),
        ("brain stem", "BrainStem"),
        ("BRAINSTEM", "BrainStem"),
        ("Spinal Cord", "SpinalCord"),
        ("cord", "SpinalCord"),
        ("Rückenmark", "SpinalCord"),
        ("Oesophagus", "Esophagus"),
        ("Ösophagus", "Esophagus"),
        ("Optic Chiasm", "Chiasm"),
        ("Bone_Mandible", "Mandible"),
        ("larynx", "Larynx"),
    ],
)
def test_what_departments_write_is_understood(roi_name: str, structure: str) -> None:
    found = structure_from_roi_name(roi_name)
    assert found is STRUCTURES[structure]


@pytest.mark.parametrize(
    "roi_name",
    [
        "Parotid_L_PRV",
        "SpinalCord_PRV05",
        "zParotid_R",
        "Parotid",
        "Parotids",
        "Parotid L+R",
        "Parotid_L_R",
        "Larynx_L",
        "SpinalCanal",
        "Larynx_SG",
        "PTV70",
        "BODY",
        "Parotid_L1",
        "ON",
        "SpinalCord~",
        "Parotid~_L",
        "_Parotid_L",
        "BrainStem^",
        "",
        "___",
    ],
)
def test_another_structure_is_never_taken_for_ours(roi_name: str) -> None:
    assert structure_from_roi_name(roi_name) is None


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=lambda s: s.name)
def test_our_own_names_and_tg263_s_are_understood(structure: Structure) -> None:
    assert structure_from_roi_name(structure.name) is structure
    assert structure_from_roi_name(structure.tg263_name) is structure


@given(st.sampled_from(sorted(STRUCTURES)), st.sampled_from(" _-./()"), st.booleans())
def test_capitals_and_separators_make_no_difference(name: str, separator: str, upper: bool) -> None:
    written = name.replace("_", separator) + separator
    assert structure_from_roi_name(written.upper() if upper else written) is STRUCTURES[name]


@given(st.text(alphabet=string.printable + "äöüéßИ耳", max_size=30))
def test_any_text_is_a_name(text: str) -> None:
    structure_from_roi_name(text)


def test_a_department_s_file_adds_and_wins(tmp_path: Path) -> None:
    path = tmp_path / "ours.toml"
    path.write_text('Parotid = ["Ohrspeichel"]\nLarynx = ["Cord", "Stimmorgan"]\n', encoding="utf-8")
    aliases = load_aliases(path)
    assert structure_from_roi_name("ohrspeichel li", aliases) is STRUCTURES["Parotid_L"]
    assert structure_from_roi_name("STIMMORGAN", aliases) is STRUCTURES["Larynx"]
    assert structure_from_roi_name("Cord", aliases) is STRUCTURES["Larynx"]
    assert structure_from_roi_name("Parotid Lt", aliases) is STRUCTURES["Parotid_L"]
    assert structure_from_roi_name("Cord") is STRUCTURES["SpinalCord"]


def test_a_marked_name_is_a_structure_where_the_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "ours.toml").write_text('Parotid = ["Parotid~", "_Parotis"]\nLarynx = ["Larynx^Exp"]\n')
    aliases = load_aliases(tmp_path / "ours.toml")
    for name, structure in {"Parotid~_L": "Parotid_L", "_Parotis Rt": "Parotid_R", "Larynx^Exp": "Larynx"}.items():
        assert structure_from_roi_name(name, aliases) is STRUCTURES[structure]
    for name in ("SpinalCord~", "Parotid^_L", "_Parotid_L", "Parotis~_R"):
        assert structure_from_roi_name(name, aliases) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('Kidney = ["Niere"]', "unknown structure Kidney"),
        ('Larynx = "Kehlkopf"', "expected a list"),
        ("Larynx = [1, 2]", "expected a list"),
        ('Larynx = ["Hals"]\nMandible = ["HALS"]', "'HALS' stands for Larynx and Mandible"),
        ("Larynx = [", "not TOML"),
        ('Larynx = ["_"]', "'_' is no name"),
        ('Parotid_L = ["Parotid Rt"]', "'Parotid Rt' is the other side of Parotid_L"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ours.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=rf"ours\.toml.*{message}"):
        load_aliases(path)


def test_a_name_with_its_side_under_a_pair_is_of_that_side(tmp_path: Path) -> None:
    (tmp_path / "ours.toml").write_text('Parotid = ["Spk links", "Spk re"]\n', encoding="utf-8")
    aliases = load_aliases(tmp_path / "ours.toml")
    assert structure_from_roi_name("Spk Lt", aliases) is STRUCTURES["Parotid_L"]
    assert structure_from_roi_name("Spk Rt", aliases) is STRUCTURES["Parotid_R"]


def test_a_file_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.toml cannot be read"):
        load_aliases(tmp_path / "none.toml")
