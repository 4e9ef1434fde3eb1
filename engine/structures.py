"""The structures: name, TG-263 name, colour. The sole source; a label is a position in ModelConfig.structures."""

from dataclasses import dataclass

from anatomynet.engine.errors import ModelError


@dataclass(frozen=True)
class Structure:
    """One organ at risk.

    Attributes:
        name: as PDDCA and OpenKBP name its file, and as configurations name it.
        tg263_name: AAPM TG-263 primary name, at most 16 characters: the ROI name in an RTSTRUCT.
        colour: red, green, blue, 0 to 255.
        mirror: the name of its left or right partner, None for an unpaired organ.
    """

    name: str
    tg263_name: str
    colour: tuple[int, int, int]
    mirror: str | None = None


STRUCTURES: dict[str, Structure] = {
    s.name: s
    for s in (
        Structure("BrainStem", "Brainstem", (0, 158, 115)),
        Structure("Chiasm", "OpticChiasm", (240, 228, 66)),
        Structure("Esophagus", "Esophagus", (204, 121, 167)),
        Structure("Larynx", "Larynx", (86, 180, 233)),
        Structure("Mandible", "Bone_Mandible", (230, 159, 0)),
        Structure("OpticNerve_L", "OpticNrv_L", (255, 109, 182), "OpticNerve_R"),
        Structure("OpticNerve_R", "OpticNrv_R", (146, 73, 255), "OpticNerve_L"),
        Structure("Parotid_L", "Parotid_L", (0, 114, 178), "Parotid_R"),
        Structure("Parotid_R", "Parotid_R", (213, 94, 0), "Parotid_L"),
        Structure("SpinalCord", "SpinalCord", (255, 255, 109)),
        Structure("Submandibular_L", "Glnd_Submand_L", (36, 255, 36), "Submandibular_R"),
        Structure("Submandibular_R", "Glnd_Submand_R", (182, 219, 255), "Submandibular_L"),
    )
}


def structures_by_name(names: tuple[str, ...]) -> tuple[Structure, ...]:
    """The structures of these names, in this order.

    Raises:
        ModelError: a name that is not in the catalogue.
    """
    unknown = [name for name in names if name not in STRUCTURES]
    if unknown:
        raise ModelError(f"unknown structure {', '.join(unknown)}: expected names from {', '.join(STRUCTURES)}")
    return tuple(STRUCTURES[name] for name in names)


def mirrored_labels(names: tuple[str, ...]) -> tuple[int, ...]:
    """For each label (0 is background) the label it becomes when left and right change places.

    A structure whose partner is not among the names becomes background.
    """
    label_of = {name: label for label, name in enumerate(names, start=1)}
    return (0, *(label_of.get(STRUCTURES[name].mirror or name, 0) for name in names))
