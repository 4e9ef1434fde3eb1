"""The catalogue of structures is sound."""

import pytest

from anatomynet.engine.config import load_config
from anatomynet.engine.errors import ModelError
from anatomynet.engine.structures import STRUCTURES, mirrored_labels, structures_by_name

LONGEST_ROI_NAME = 16  # TG-263, and what some planning systems show


def test_every_key_is_the_name() -> None:
    assert all(key == structure.name for key, structure in STRUCTURES.items())


def test_roi_names_are_short_and_unique() -> None:
    names = [structure.tg263_name for structure in STRUCTURES.values()]
    assert max(map(len, names)) <= LONGEST_ROI_NAME
    assert len(set(names)) == len(names)
    assert all(name.isascii() for name in names)


def test_colours_are_bytes_and_unique() -> None:
    colours = [structure.colour for structure in STRUCTURES.values()]
    assert all(0 <= part <= 255 for colour in colours for part in colour)
    assert len(set(colours)) == len(colours)


def test_a_mirror_is_mutual_and_changes_the_side() -> None:
    for structure in STRUCTURES.values():
        if structure.mirror is None:
            assert not structure.name.endswith(("_L", "_R"))
        else:
            assert STRUCTURES[structure.mirror].mirror == structure.name
            assert {structure.name[-2:], structure.mirror[-2:]} == {"_L", "_R"}
            assert structure.name[:-2] == structure.mirror[:-2]


def test_sides_of_roi_names_agree_with_sides_of_names() -> None:
    for structure in STRUCTURES.values():
        if structure.mirror:
            assert structure.tg263_name[-2:] == structure.name[-2:]


def test_mirrored_labels_by_hand() -> None:
    assert mirrored_labels(("BrainStem", "Parotid_R", "Mandible", "Parotid_L")) == (0, 1, 4, 3, 2)


def test_a_mirrored_structure_without_its_partner_becomes_background() -> None:
    # Of two parotids this model draws the left; where a mirrored image shows it, lies what would be a right one.
    assert mirrored_labels(("BrainStem", "Parotid_L")) == (0, 1, 0)


@pytest.mark.parametrize("name", ["oar9", "openkbp7"])
def test_mirroring_twice_changes_nothing(name: str) -> None:
    mirror = mirrored_labels(load_config(name)[0].structures)
    assert [mirror[label] for label in mirror] == list(range(len(mirror)))


def test_names_are_found_in_their_order() -> None:
    assert [s.tg263_name for s in structures_by_name(("SpinalCord", "BrainStem"))] == ["SpinalCord", "Brainstem"]
    assert structures_by_name(()) == ()


def test_unknown_names_are_all_told() -> None:
    with pytest.raises(ModelError, match="unknown structure Heart, Liver: expected names from BrainStem"):
        structures_by_name(("BrainStem", "Heart", "Liver"))
