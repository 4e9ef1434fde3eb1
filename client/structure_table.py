"""What a department calls each structure in its files, and how it shows it: a TOML table over the catalogue.

    [Parotid_L]
    name = "Parotis links"          # ROIName; the TG-263 name without
    label = "PAROTIS L"             # ROIObservationLabel, at most 16 characters; the name's first 16 without
    colour = [0, 114, 178]          # red, green, blue; the catalogue's without
    interpreted_type = "AVOIDANCE"  # RTROIInterpretedType; ORGAN without

A key is a structure's name in the catalogue; what a table leaves out stays as it is.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from anatomynet.engine.aliases import structure_from_roi_name
from anatomynet.engine.errors import ModelError
from anatomynet.engine.structures import STRUCTURES, Structure, structures_by_name
from anatomynet.engine.volume import LabelMap

LONGEST_NAME, LONGEST_LABEL = 64, 16  # DICOM's LO and SH (PS3.5 6.2)
# Of those that PS3.3 C.8.8.8.1 defines, what an organ at risk can be.
INTERPRETED_TYPES = ("ORGAN", "AVOIDANCE", "CONTROL", "CAVITY", "DOSE_REGION")


@dataclass(frozen=True)
class RoiStyle:
    """How one structure is written.

    Attributes:
        name: of the ROI or segment.
        label: ROIObservationLabel, at most 16 characters.
        colour: red, green, blue, 0 to 255.
        interpreted_type: RTROIInterpretedType.
    """

    name: str
    label: str
    colour: tuple[int, int, int]
    interpreted_type: str = "ORGAN"


StructureTable = Mapping[str, RoiStyle]  # by the structure's name


def load_structure_table(path: Path | None = None) -> StructureTable:
    """Every structure of the catalogue, as it stands there and as a department's file changes it.

    Raises:
        ModelError: a file that is not there or not TOML, an unknown structure or key, a value that DICOM does not
            allow, one name for two structures.
    """
    table = {s.name: RoiStyle(s.tg263_name, s.tg263_name[:LONGEST_LABEL], s.colour) for s in STRUCTURES.values()}
    if path is None:
        return table
    try:
        changes = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: expected a TOML table of structures") from error
    except tomllib.TOMLDecodeError as error:
        raise ModelError(f"{path.name} is not TOML: {error}") from error
    for name, values in changes.items():
        if name not in table or not isinstance(values, dict):
            raise ModelError(f"{path.name}: {name} is no structure; expected a table [{'], ['.join(STRUCTURES)}]")
        table[name] = _changed(table[name], values, f"{path.name}: [{name}]")
    first_with: dict[str, str] = {}
    for name, style in table.items():
        other = first_with.setdefault(style.name.casefold(), name)
        if other != name:
            raise ModelError(f"{path.name}: {other} and {name} are both called {style.name!r}; expected two names")
    return table


def _changed(style: RoiStyle, values: Mapping[str, Any], where: str) -> RoiStyle:
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "name": (lambda v: _is_text(v, LONGEST_NAME), f"1 to {LONGEST_NAME} ASCII characters without a backslash"),
        "label": (lambda v: _is_text(v, LONGEST_LABEL), f"1 to {LONGEST_LABEL} ASCII characters without a backslash"),
        "colour": (_is_colour, "[red, green, blue], each 0 to 255"),
        "interpreted_type": (lambda v: v in INTERPRETED_TYPES, f"one of {', '.join(INTERPRETED_TYPES)}"),
    }
    for key, value in values.items():
        if key not in checks:
            raise ModelError(f"{where} has an unknown key {key}; expected {', '.join(checks)}")
        fits, expected = checks[key]
        if not fits(value):
            raise ModelError(f"{where} {key} is {value!r}; expected {expected}")
    name = str(values.get("name", style.name))
    return replace(
        style,
        name=name,
        label=str(values.get("label", name[:LONGEST_LABEL].strip())),
        colour=tuple(values.get("colour", style.colour)),
        interpreted_type=str(values.get("interpreted_type", style.interpreted_type)),
    )


def _is_text(value: Any, longest: int) -> bool:
    """Text that every character set of DICOM can hold: the file keeps that of its CT."""
    if not isinstance(value, str) or value != value.strip() or "\\" in value:
        return False
    return 0 < len(value) <= longest and value.isascii() and value.isprintable()


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value)


def chosen_structures(
    names: Sequence[str], available: Sequence[str], table: StructureTable | None = None
) -> tuple[Structure, ...]:
    """The structures that a user names: by the catalogue, TG-263, an alias of them, or the department's own table.

    Args:
        names: at least one.
        available: names of those that the model draws.
        table: the department's.

    Returns:
        In the order of `available`.

    Raises:
        ModelError: a name that is none of the model's.
    """
    own = {style.name.casefold(): name for name, style in (table or {}).items()}
    found = set()
    for name in names:
        alias = structure_from_roi_name(name)
        known = own.get(name.strip().casefold()) or (alias.name if alias else "")
        if known not in available:
            raise ModelError(f"unknown structure {name!r}; expected names from {', '.join(available)}")
        found.add(known)
    return structures_by_name(tuple(name for name in available if name in found))


def only_structures(label_map: LabelMap, wanted: Sequence[Structure]) -> LabelMap:
    """A label map with these of its structures alone, labelled anew in this order; the others become background."""
    if tuple(wanted) == label_map.structures:
        return label_map
    positions = [label_map.structures.index(structure) for structure in wanted]
    relabelled = np.zeros(len(label_map.structures) + 1, np.uint8)
    relabelled[np.array(positions, np.intp) + 1] = np.arange(1, len(positions) + 1)
    return replace(
        label_map,
        labels=relabelled[label_map.labels],
        structures=tuple(wanted),
        confidence=label_map.confidence and tuple(label_map.confidence[p] for p in positions),
        stray_ml=label_map.stray_ml and tuple(label_map.stray_ml[p] for p in positions),
    )
