"""The phantom's table of anatomy: every organ, bone and space of one person, in the order in which it is painted.

Stands between the shapes (engine.phantom_shapes) and the painter (engine.phantom). The anatomy's frame is LPS in mm
with its origin midway between the parotid glands: the vertex lies at z = 159, the chin at z = -42, the upper end of
the breastbone at z = -125. Positions and sizes follow the means of clinical contours. Rows of a Tube are
(x, y, z, radius), rows of a Loft (z, x, y, radius x, radius y); what comes in pairs is written down for the left.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from anatomynet.engine.phantom_shapes import Common, Ellipsoid, HalfSpace, Loft, Shape, Tube, Union

VERTEX_Z = 159.0
BOTTOM_Z = -330.0  # the anatomy goes no further down
BACK_Y = 146.0  # of the shoulder blades: where the couch is
LEFT, RIGHT = 1, -1  # the sign of x

# Hounsfield units
AIR, LUNG, FOAM = -1000, -820, -960
FAT, SKIN, MUSCLE, MUCOSA, BLOOD = -98, 15, 52, 42, 48
CORTICAL, DENSE, CANCELLOUS, DISC, OSSIFIED_CARTILAGE = 1000, 700, 280, 85, 210
CSF, BRAIN, WHITE_MATTER, STEM, CORD, NERVE = 8, 37, 31, 33, 40, 35
SCLERA, VITREOUS, LENS = 55, 5, 85
SUBMANDIBULAR, THYROID = 40, 105
JAW_CORTEX, ENAMEL, DENTINE, FILLING = 1300, 1900, 1200, 3000

FASCIA = ((-1.2, -50), (0, MUSCLE))  # fat between the muscles, then muscle
SINUS = ((-1.5, DENSE), (0, AIR))
TUBE_OF_AIR = ((-1.5, MUCOSA), (0, AIR))

# The spinal cord's and the oesophagus's centre: rows z, y. Neck and chest hang on the first.
CORD_PATH = (
    (30, 25), (12, 26), (0, 25.5), (-20, 26), (-40, 29), (-60, 33.4), (-80, 38.6), (-100, 45.5), (-120, 54),
    (-140, 63.5), (-160, 72), (-180, 81), (-200, 89), (BOTTOM_Z, 112),
)  # fmt: skip
GULLET_PATH = ((-97, 12.5), (-110, 16), (-120, 20.5), (-140, 27.5), (-160, 34), (-180, 41), (-200, 47), (BOTTOM_Z, 68))
# Centre of each vertebra from C1 down, z; the eighth is T1.
VERTEBRAE_Z = (7, -11, -30, -47, -64, -81, -99, -118, -138, -159, -181, -204, -228, -253, -279, -306)
# The lung's outer wall: z, |x| of its lateral face, its radii along x and y.
LUNG_WALL = (
    (-112, 48, 5, 8), (-118, 66, 19, 22), (-130, 84, 31, 36), (-150, 103, 42, 52), (-180, 120, 52, 68),
    (BOTTOM_Z, 132, 58, 84),
)  # fmt: skip

# Left muscles; the tubes of fat beside them are painted first.
NECK_FAT = Loft((
    (4, 0, 40, 50, 34), (-20, 0, 36, 58, 38), (-45, 0, 34, 56, 40), (-75, 0, 46, 62, 46), (-100, 0, 62, 90, 44),
    (-112, 0, 70, 55, 28), (-122, 0, 78, 20, 10),
))  # fmt: skip
FAT_PADS = {
    "posterior triangle": Tube(((54, 28, -40, 5), (64, 36, -75, 10), (86, 32, -103, 17)), (1, 1.3, 1)),
    "buccal": Tube(((47, -54, 30, 9), (46, -48, 4, 9)), (1, 1.3, 1)),
    "parapharyngeal": Tube(((30, -8, 34, 5), (30, -2, 10, 5.5), (32, 0, -20, 3))),
    "nuchal": Tube(((0, 86, 40, 5), (0, 66, -30, 6), (0, 84, -80, 5)), (0.5, 1.8, 1)),
    "axilla": Tube(((140, 48, -140, 10), (152, 50, -190, 16), (158, 52, BOTTOM_Z, 16)), (0.7, 1.6, 1)),
}
MUSCLES = {
    "semispinalis": Tube(
        ((18, 48, 6, 10), (17, 60, -45, 12), (20, 96, -140, 15), (24, 128, BOTTOM_Z, 17)), (1, 1.25, 1)
    ),
    "splenius": Tube(((42, 46, 4, 9), (38, 62, -45, 11), (38, 84, -95, 12), (44, 108, -170, 13)), (1.2, 1, 1)),
    "levator scapulae": Tube(((46, 32, -6, 7), (46, 42, -60, 9), (66, 66, -104, 10)), (0.9, 1.2, 1)),
    "trapezius": Tube(((12, 66, -15, 3), (26, 70, -60, 5), (60, 78, -95, 7), (108, 76, -114, 8)), (1.8, 1.2, 1)),
    "rhomboid": Tube(((16, 94, -85, 5), (34, 104, -112, 7)), (2.4, 1, 1)),
    "scalenes": Tube(((28, 18, -35, 6), (29, 26, -80, 7), (42, 30, -116, 8))),
    "longus colli": Tube(((9, 6, 0, 5), (9, 10, -50, 5), (10, 22, -105, 5)), (1.3, 0.7, 1)),
    "sternocleidomastoid": Tube(((60, 27, 12, 8), (53, 14, -45, 10), (36, -4, -90, 9), (14, -9, -122, 6)), (1, 1.4, 1)),
    "masseter": Tube(((59, -36, 36, 6.5), (57, -31, 5, 7.5), (50, -22, -16, 6)), (0.8, 2.1, 1)),
    "medial pterygoid": Tube(((30, -24, 36, 6), (38, -20, 5, 8), (43, -16, -14, 5)), (0.8, 1.6, 1)),
    "temporalis": Tube(((60, -22, 90, 7), (58, -26, 55, 9), (52, -32, 28, 6)), (0.7, 2.4, 1)),
    "digastric": Tube(((54, 14, 4, 4), (38, -8, -36, 4), (14, -50, -40, 5))),
    "strap": Tube(((9, -29, -48, 4), (12, -23, -80, 5), (12, -16, -124, 5)), (1.5, 0.7, 1)),
    "pectoral": Tube(((60, -14, -135, 9), (120, 10, -150, 10), (168, 40, -170, 9)), (1, 0.8, 2.5)),
}


@dataclass(frozen=True)
class Part:
    """One stroke of the painter.

    Attributes:
        shape: what is painted.
        layers: (depth under the surface in mm, Hounsfield units), outermost first; a depth below zero lies outside.
        label: name of the structure whose contour the shape's surface is; empty for none.
        grain: standard deviation of the innermost layer's own texture, HU.
    """

    shape: Shape
    layers: tuple[tuple[float, float], ...] = ()
    label: str = ""
    grain: float = 0.0


@dataclass(frozen=True)
class Person:
    """What differs between people beside size and posture (engine.phantom.Posture); pairs are (left, right).

    Attributes:
        fat_mm: under the skin.
        parotid_size: of each gland's cross-section, 1 is the mean.
        parotid_hu: lower where fat has grown into the glands.
        submandibular_size: of each gland's radii.
        maxillary_sinus: of each sinus's radii.
        frontal_side: on which side the frontal sinus lies.
        filled_side: on which side a lower molar carries a metal filling.
        jaw_size: of the mandible's thickness.
        jaw_turn: lateral deviation of the chin, mm to the left.
        larynx_size: of its cross-section.
        blood_hu: contrast agent raises it.
    """

    fat_mm: float = 8.0
    parotid_size: tuple[float, float] = (1.0, 1.0)
    parotid_hu: float = 10.0
    submandibular_size: tuple[float, float] = (1.0, 1.0)
    maxillary_sinus: tuple[float, float] = (1.0, 0.85)
    frontal_side: int = RIGHT
    filled_side: int = LEFT
    jaw_size: float = 1.0
    jaw_turn: float = 0.0
    larynx_size: float = 1.0
    blood_hu: float = BLOOD


def parts_of(person: Person) -> list[Part]:
    """Every part of a person, in the order in which it must be painted: later parts cover earlier ones."""
    groups = (
        _skin, _muscles, _chest, _vessels, _spine, _skull, _brain,
        _face, _nose_and_sinuses, _orbits, _mouth, _larynx, _airway, _gullet, _glands, _jaw,
    )  # fmt: skip
    return [part for group in groups for part in group(person)]


def couch_part(x: float, y: float) -> Part:
    """The couch top with its middle at x and its upper face at y mm, in the scanner's frame: carbon fibre on foam."""
    return Part(Ellipsoid((x, y + 14, 0), (215, 14, 1e5), boxy=True), ((0, -250), (2.0, FOAM)))


def _both(
    shape: Shape, layers: tuple[tuple[float, float], ...], *, label: str = "", grain: float = 0.0
) -> Iterator[Part]:
    """The left shape and its mirror image; a label is given its side."""
    for side, one in (("_L", shape), ("_R", shape.mirrored())):
        yield Part(one, layers, label and label + side, grain)


def _pair(*shapes: Shape) -> Union:
    """Left shapes and their mirror images as one."""
    return Union(tuple(one for shape in shapes for one in (shape, shape.mirrored())))


def _bone(shape: Shape, core: float = CANCELLOUS) -> Part:
    return Part(shape, ((0, CORTICAL), (1.5, core)), grain=30)


def _column(path: tuple[tuple[float, float], ...], radius_x: float, radius_y: float, *, behind: float = 0.0) -> Loft:
    return Loft(tuple((z, 0.0, y + behind, radius_x, radius_y) for z, y in path))


def _cord_y(z: float) -> float:
    levels, ys = np.array(CORD_PATH[::-1]).T
    return float(np.interp(z, levels, ys))


def _skin(person: Person) -> Iterator[Part]:
    cranium = Ellipsoid((0, 14, 72), (76, 97, VERTEX_Z - 72))
    neck = Loft((
        (62, 0, 17, 71, 90), (40, 0, 18, 74, 87), (20, 0, 18, 77, 78), (0, 0, 16, 78, 71), (-20, 0, 19, 72, 64),
        (-40, 0, 22, 66, 58), (-60, 0, 26, 66, 63), (-75, 0, 32, 75, 68), (-95, 0, 45, 100, 74), (-120, 0, 54, 140, 83),
        (-140, 0, 54, 165, 92), (-170, 0, 49, 178, 101), (-200, 0, 42, 182, 110), (BOTTOM_Z, 0, 35, 182, 118),
    ))  # fmt: skip
    face = Loft((
        (80, 0, -30, 48, 44), (60, 0, -22, 66, 64), (30, 0, -12, 69, 76), (0, 0, -9, 67, 82), (-20, 0, -9, 62, 83),
        (-32, 0, -11, 57, 80), (-42, 0, -9, 52, 73), (-49, 0, -8, 48, 62), (-57, 0, -3, 46, 51), (-67, 0, 3, 46, 43),
        (-82, 0, 10, 46, 39),
    ))  # fmt: skip
    nose = Tube(((0, -80, 68, 7), (0, -94, 45, 11), (0, -90, 37, 12)))
    girdle = Loft((
        (-104, 0, 66, 100, 34), (-120, 0, 66, 170, 48), (-150, 0, 62, 212, 66),
        (-200, 0, 56, 224, 80), (BOTTOM_Z, 0, 54, 224, 84),
    ), boxy=True)  # fmt: skip
    shoulder = Tube(
        ((40, 64, -103, 42), (113, 66, -120, 40), (163, 70, -134, 44), (190, 73, -152, 46), (197, 78, BOTTOM_Z, 47))
    )
    ear = Tube(((71, 8, 12, 4), (77, 16, 28, 6), (78, 18, 42, 5)), (0.7, 1.6, 1.3))
    yield from _both(ear, ((0, -30),))
    fat = person.fat_mm
    layers = ((0, SKIN), (1.8, FAT), (fat, MUSCLE), (fat + 7, -20), (fat + 8.2, MUSCLE))  # a fascia parts two sheets
    yield Part(Union((cranium, neck, face, nose, girdle, shoulder, shoulder.mirrored())), layers, grain=12)


def _muscles(person: Person) -> Iterator[Part]:
    yield Part(NECK_FAT, ((0, -40),), grain=25)
    yield Part(_column(CORD_PATH[2:9], 23, 17, behind=-5), ((0, MUSCLE),), grain=12)  # the deep ones, round the spine
    for pad in FAT_PADS.values():
        yield from _both(pad, ((0, FAT), (3, FAT + 8)), grain=10)
    for muscle in MUSCLES.values():
        yield from _both(muscle, FASCIA, grain=10)


def _chest(person: Person) -> Iterator[Part]:
    lung = Loft(tuple((z, x - rx, 46, rx, ry) for z, x, rx, ry in LUNG_WALL))
    blade = Tube(((160, 76, -128, 8), (128, 100, -152, 5), (98, 118, -230, 3)), (1, 1, 2.6))
    ridge = Tube(((162, 66, -108, 6), (128, 90, -124, 5), (88, 106, -138, 4)))
    clavicle = Tube(((14, -9, -129, 9), (52, -8, -124, 6), (104, 18, -110, 5.5), (152, 50, -102, 7)))
    humerus = Tube(((183, 66, -134, 23), (186, 68, -142, 24), (197, 72, -172, 13), (201, 76, BOTTOM_Z, 12)))
    ribs = tuple(_rib(z) for z in VERTEBRAE_Z[7:14])
    yield from _both(lung, ((-2, MUSCLE), (0, LUNG)), grain=45)
    for bone in (*ribs, clavicle, Union((blade, ridge)), humerus):
        for one in (bone, bone.mirrored()):
            yield _bone(one)
    yield _bone(Tube(((0, -12, -132, 9), (0, -32, -175, 7), (0, -58, BOTTOM_Z, 7)), (2.2, 0.8, 1)))  # breastbone


def _rib(z: float) -> Tube:
    """From its vertebra round the left lung, falling, towards the breastbone."""
    levels, reach, _, depth = np.array(LUNG_WALL[::-1]).T
    angles = np.radians((80, 62, 40, 15, -15, -45, -70))
    falls = np.array((-2, 2, 9, 18, 28, 38, 44)) * np.interp(z, (-160, -118), (1.0, 0.45))
    knots = [(20.0, _cord_y(z) - 4, z, 4.2)]
    for angle, fall in zip(angles, falls, strict=True):
        x, y = (np.interp(z - fall, levels, wall) + 6 for wall in (reach, depth))
        # Nearly a rectangle with round corners: the chest is flat in front and behind.
        across, along = (np.sign(c) * np.abs(c) ** 0.7 for c in (np.cos(angle), np.sin(angle)))
        knots.append((float(x * across), float(46 + y * along), float(z - fall), 4.2))
    return Tube(tuple(knots), (1, 1, 1.3))


def _vessels(person: Person) -> Iterator[Part]:
    blood = ((-1.2, -70), (0, person.blood_hu))
    mediastinum = Loft(((-128, 0, 8, 24, 22), (-150, 0, 8, 30, 30), (-180, 3, 6, 34, 44), (BOTTOM_Z, 10, 0, 52, 60)))
    carotid = Tube(((26, 8, 20, 3), (27, 6, -40, 4), (23, 4, -80, 3.5), (16, 4, -125, 4)))
    jugular = Tube(((32, 12, 20, 4), (36, 10, -40, 6), (33, 4, -80, 6.5), (22, -2, -128, 7)), (1.2, 0.9, 1))
    subclavian = Tube(((20, 0, -130, 6), (60, 20, -128, 5), (110, 30, -130, 4)))
    great_veins = Tube(((-8, 0, -145, 12), (-4, -4, -190, 16), (0, -6, BOTTOM_Z, 30)))
    aortic_arch = Tube(((-4, -2, -188, 12), (10, 20, -184, 12), (20, 56, -196, 12), (22, 78, BOTTOM_Z, 12)))
    yield Part(mediastinum, ((0, -80),), grain=15)
    for vessel in (carotid, jugular, subclavian):
        yield from _both(vessel, blood)
    for vessel in (great_veins, aortic_arch):
        yield Part(vessel, blood)


def _spine(person: Person) -> Iterator[Part]:
    yield Part(_column(CORD_PATH[2:], 10, 8, behind=-16), ((0, DISC),))
    for number, z in enumerate(VERTEBRAE_Z):
        yield from _vertebra(number, float(z))
    yield _bone(Tube(((0, 14.5, -12, 5.5), (0, 12.5, 12, 4.5))))  # dens
    yield Part(_column(CORD_PATH, 11.5, 8.2), ((0, -20), (1.5, CSF)))
    yield Part(_column(CORD_PATH, 7.0, 5.2), ((0, CORD),))
    # Planning contours hold the cord with a rim of fluid, from the foramen magnum down.
    yield Part(_column(CORD_PATH[1:], 7.8, 6.2), label="SpinalCord")


def _vertebra(number: int, z: float) -> Iterator[Part]:
    """Body, arch, pillars, transverse processes and spinous process of C1 (0), C2 (1), ..."""
    y, atlas = _cord_y(z), number == 0
    thoracic = float(np.clip((number - 6) / 3, 0, 1))
    size = (11.5 + 3 * thoracic, 8.5 + 3.5 * thoracic, 7.5 + 3.4 * thoracic)
    body = Ellipsoid((0, y - 17 - 2 * thoracic, z), size, boxy=True)
    arch = Ellipsoid((0, y + 1, z - 1), (20 if atlas else 17.5, 13.5, 4.5 if atlas else 6), boxy=True)
    pillar = Ellipsoid((21 if atlas else 17.5, y - 5, z), (7.5, 8, 7 if atlas else 8.5), boxy=True)
    tip = (33.0, y - 6, z, 3.5) if atlas else (26 + 6 * thoracic, y - 8 + 12 * thoracic, z - 2, 3.5)
    transverse = Tube(((17.5, y - 5, z, 5), tip))
    reach = (5.0, 22.0, 17.0, 17.0, 21.0, 28.0, 36.0)[min(number, 6)]
    spinous = Tube(((0, y + 11, z - 2, 4), (0, y + 11 + reach, z - 6 - 8 * thoracic, 3)), (1, 1, 1.5))
    if not atlas:
        yield _bone(body)
    for bone in (arch, *_pair(pillar, transverse).shapes):
        yield _bone(bone)
    yield _bone(spinous, core=200)


def _skull(person: Person) -> Iterator[Part]:
    # The floor falls from the roof of the orbits to the foramen magnum; two fossae go below it.
    vault = Common((Ellipsoid((0, 14, 72), (65, 84, 76)), HalfSpace((0, 27, 15), (0, -0.61, -0.79))))
    middle_fossa = Ellipsoid((37, -8, 57), (20, 21, 17))
    posterior_fossa = Ellipsoid((0, 50, 40), (48, 38, 27))
    calvarium = ((-6.5, CORTICAL), (-4.7, 450), (-2.3, CORTICAL), (0, CSF), (1.5, BRAIN))
    petrous = Tube(((14, 0, 46, 5), (34, 9, 40, 8), (56, 19, 35, 10)))
    mastoid = Tube(((56, 21, 34, 11), (57, 24, 14, 7)), (1, 1.2, 1))
    ear_canal = Tube(((74, 12, 28, 3.2), (50, 10, 32, 3)))
    sphenoid_wing = Tube(((10, -22, 74, 4), (34, -28, 77, 3.5), (58, -32, 78, 4)))
    yield Part(Union((vault, posterior_fossa, middle_fossa, middle_fossa.mirrored())), calvarium, grain=6)
    yield from _both(petrous, ((0, CORTICAL), (3, DENSE)), grain=80)
    yield from _both(mastoid, ((0, CORTICAL), (2.5, -350)), grain=220)
    yield from _both(ear_canal, ((0, AIR),))
    yield from _both(sphenoid_wing, ((0, DENSE),))
    for condyle in _pair(Tube(((11, 16, 18, 7), (17, 20, 13, 7)))).shapes:
        yield _bone(condyle)
    yield _bone(Tube(((0, -10, 62, 9), (0, 1, 42, 8), (0, 11, 20, 6)), (1.6, 1, 1)), core=350)  # clivus
    yield _bone(Tube(((0, -42, 68, 12), (0, -10, 62, 13)), (1.3, 1, 0.9)), core=350)  # body of the sphenoid
    yield Part(Loft(((-2, 0, 25.6, 14, 12), (14, 0, 26.5, 15, 14), (24, 0, 28, 17, 17))), ((0, CSF),))  # foramen magnum


def _brain(person: Person) -> Iterator[Part]:
    white_matter = Ellipsoid((29, 8, 98), (24, 58, 26))
    lateral_ventricle = Tube(((9, -22, 102, 5), (11, 8, 106, 4), (22, 42, 98, 6), (26, 24, 84, 3)))
    third_ventricle = Tube(((0, 0, 92, 2.5), (0, 24, 88, 2.5)))
    # Fluid shows the stem's borders: before it, behind it, and round the midbrain up to its end.
    cistern = Loft(((10, 0, 24, 14, 10), (30, 0, 20, 17, 12), (50, 0, 15, 19, 14), (74, 0, 8, 17, 14)))
    cisterna_magna = Loft(((20, 0, 30, 14, 13), (34, 0, 29, 12, 9)))
    fourth_ventricle = Loft(((30, 0, 33, 8, 5), (38, 0, 34, 12, 6.5), (46, 0, 33, 13, 6.5), (58, 0, 30, 10, 5)))
    ambient_cistern = Loft(((54, 0, 19, 18.5, 16), (74, 0, 17, 18, 15)))
    tentorium = Ellipsoid((0, 58, 64), (36, 28, 2))  # the midbrain lies in its notch
    stem = Loft((
        (12.2, 0, 26, 7.9, 7), (20, 0, 26, 9.2, 7.9), (30, 0, 24.5, 10.4, 9.4), (38, 0, 22.5, 13.4, 11.2),
        (50, 0, 19, 15.6, 13.3), (61, 0, 16.5, 16, 13.8), (73, 0, 16, 14.8, 12.4),
    ))  # fmt: skip
    yield from _both(white_matter, ((0, WHITE_MATTER),), grain=4)
    yield from _both(lateral_ventricle, ((0, CSF),))
    yield Part(tentorium, ((0, BRAIN + 10),))
    for space in (third_ventricle, cistern, cisterna_magna, fourth_ventricle, ambient_cistern):
        yield Part(space, ((0, CSF),))
    yield Part(stem, ((0, STEM),), "BrainStem")


def _face(person: Person) -> Iterator[Part]:
    zygoma = Tube(((40, -62, 46, 7), (57, -49, 45, 5.5), (66, -22, 40, 3.2), (63, 0, 38, 3.5)))
    orbital_rim = Tube(((44, -60, 50, 5), (47, -56, 66, 4), (44, -58, 84, 5)))
    pterygoid_plate = Tube(((13, -25, 44, 3), (16, -21, 18, 2)), (1, 2.2, 1))
    for bone in _pair(zygoma, orbital_rim).shapes:
        yield _bone(bone)
    yield from _both(pterygoid_plate, ((0, DENSE),))
    yield _bone(_dental_arch(15, 24, radius=5.5))
    yield Part(Ellipsoid((0, -50, 24), (22, 26, 3), boxy=True), ((0, DENSE),))  # hard palate
    yield Part(Tube(((0, -79, 72, 4), (0, -87, 57, 2.5)), (1.3, 1, 1)), ((0, DENSE),))  # nasal bones


def _nose_and_sinuses(person: Person) -> Iterator[Part]:
    left, right = person.maxillary_sinus
    for x, size in ((27, left), (-27, right)):
        yield Part(Ellipsoid((x, -45, 43), (13 * size, 17 * size, 16 * size), boxy=True), SINUS)
    yield Part(Ellipsoid((0, -43, 68), (13, 20, 11), boxy=True), ((-1.2, DENSE), (0, -650)), grain=250)  # ethmoid cells
    yield Part(Ellipsoid((0, -48, 44), (13, 34, 19), boxy=True), ((-1.2, DENSE), (0, AIR)))  # nasal cavity
    lower_turbinate = Tube(((6.5, -66, 34, 4.5), (6.5, -26, 33, 5)), (1, 1, 1.8))
    middle_turbinate = Tube(((6, -58, 49, 3.5), (6, -30, 47, 3.5)), (1, 1, 2.1))
    for turbinate in (lower_turbinate, middle_turbinate):
        yield from _both(turbinate, ((0, MUCOSA),))
    yield Part(Ellipsoid((0, -50, 44), (1.2, 30, 19), boxy=True), ((0, 200),))  # septum
    yield Part(Ellipsoid((1, -17, 62), (12, 12, 10), boxy=True), SINUS)  # sphenoid
    yield Part(Ellipsoid((8 * person.frontal_side, -72, 89), (11, 5, 10)), ((-2, CORTICAL), (0, AIR)))
    yield Part(Ellipsoid((0, -1, 68), (6, 6, 5)), ((0, MUCOSA),))  # pituitary


def _orbits(person: Person) -> Iterator[Part]:
    cone = Tube(((31, -62, 68, 17.5), (28, -42, 68, 14), (17, -20, 68, 4)))
    bony = Common((cone, HalfSpace((0, -64, 68), (0, -1, 0))))  # open in front
    fatty = Common((cone, HalfSpace((0, -70, 68), (0, -1, 0))))
    rectus_ends = ((28, -50, 78, 2.2), (28, -50, 58, 2.2), (20, -50, 68, 2.2), (40, -50, 68, 2.2))
    recti = Union(tuple(Tube(((18, -22, 68, 2), end)) for end in rectus_ends))
    nerve = Tube(((30, -49.5, 68, 2.3), (25, -36, 67, 2.3), (17, -21, 69, 2.4), (10, -10, 73, 2.4), (7.5, -8, 74, 2.4)))
    crossing = _pair(Tube(((7, -7.5, 74, 2.5), (0, -3, 74.5, 3), (-8, 3, 75.5, 2.4))))
    yield from _both(bony, ((-2, DENSE),))
    yield from _both(fatty, ((0, FAT),))
    yield from _both(recti, ((0, MUSCLE),))
    yield from _both(Ellipsoid((31, -62, 68), (12.2, 12.2, 12.2)), ((0, SCLERA), (1.5, VITREOUS)))
    yield from _both(Ellipsoid((31, -70.5, 68), (4.6, 2.2, 4.6)), ((0, LENS),))
    yield from _both(nerve, ((0, NERVE),), label="OpticNerve")
    yield Part(crossing, ((-2, CSF), (0, NERVE)), "Chiasm")


def _mouth(person: Person) -> Iterator[Part]:
    tongue = Ellipsoid((0, -46, 0), (24, 28, 19))
    genioglossus = Tube(((0, -30, -18, 13), (0, -62, -24, 9)))
    gap = Ellipsoid((0, -50, 18.5), (13, 19, 2))
    soft_palate = Tube(((0, -28, 24, 3.5), (0, -12, 14, 4), (0, -9, 4, 2.5)), (3, 1, 1))
    hyoid = Tube(((20, -2, -41, 2), (15, -22, -44, 2.8), (0, -31, -46, 3.4)))
    yield Part(tongue, ((-1, 0), (0, MUSCLE)), grain=14)
    yield Part(genioglossus, ((-1, -20), (0, MUSCLE)), grain=14)
    yield Part(gap, ((0, AIR),))
    yield Part(soft_palate, ((0, MUCOSA),))
    yield _bone(_pair(hyoid))


def _larynx(person: Person) -> Iterator[Part]:
    s = person.larynx_size
    contour = Loft((
        (-59.5, 0, -9, 14.6 * s, 14.2 * s), (-69, 0, -9, 16 * s, 14.8 * s),
        (-81, 0, -9, 15.2 * s, 15.6 * s), (-95, 0, -8, 13.2 * s, 13.6 * s),
    ))  # fmt: skip
    shield = Loft(((-62, 0, -9, 14.2 * s, 14.2 * s), (-84, 0, -9, 13.2 * s, 14.2 * s)))
    cricoid = Loft(((-84, 0, -8, 12.5 * s, 12.5 * s), (-94, 0, -8, 12 * s, 12 * s)))
    arytenoid = Ellipsoid((6, -1, -76), (3, 3, 5))
    yield Part(contour, ((0, MUCOSA),), "Larynx")
    yield Part(Common((shield, HalfSpace((0, -3, -70), (0, 1, 0)))), ((0, OSSIFIED_CARTILAGE), (2.8, 10)), grain=50)
    yield Part(cricoid, ((0, OSSIFIED_CARTILAGE), (2.5, MUCOSA)), grain=20)
    yield from _both(arytenoid, ((0, OSSIFIED_CARTILAGE),))


def _airway(person: Person) -> Iterator[Part]:
    throat = Loft((
        (52, 0, -14, 10, 6), (44, 0, -11, 13, 10), (32, 0, -8, 14, 11), (18, 0, -3, 13, 6), (4, 0, -3, 11, 4.5),
        (-15, 0, -4, 12, 5.5), (-32, 0, -8, 14, 9), (-46, 0, -11, 14, 9), (-60, 0, -11, 10, 10), (-70, 0, -11, 6, 11),
        (-76, 0, -12, 2.6, 10), (-82, 0, -11, 6, 10), (-94, 0, -8, 8, 9),
    ))  # fmt: skip
    trachea = Loft((
        (-94, 0, -8, 8, 9), (-105, 0, -4, 8.5, 8.5), (-120, 0, 5, 8.5, 8.5), (-140, 0, 12.5, 9, 8.5),
        (-160, -1, 19, 9, 8.5), (-185, -2, 27, 10, 8.5),
    ))  # fmt: skip
    epiglottis = Tube(((0, -12, -58, 2), (0, -17, -44, 1.8), (0, -16, -36, 1.5)), (4, 1, 1))
    for tube in (throat, trachea):
        yield Part(tube, TUBE_OF_AIR)
    yield from _both(Tube(((1, 27, -184, 8), (34, 36, -212, 6))), TUBE_OF_AIR)  # main bronchi
    yield Part(epiglottis, ((0, MUCOSA),))


def _gullet(person: Person) -> Iterator[Part]:
    # It leaves the midline for the left below the cricoid.
    contour = Loft(tuple((z, min(4.0, (-97 - z) / 12), y, 7.8, 5.8) for z, y in GULLET_PATH))
    yield Part(contour, ((-1, -40), (0, MUCOSA)), "Esophagus")
    yield Part(Tube(((3, 24, -130, 1.8), (3.5, 29, -143, 1.5)), (1.6, 1, 1)), ((0, -600),))  # swallowed air


def _glands(person: Person) -> Iterator[Part]:
    rind = (-1.2, FAT)
    for side, size, small in zip("LR", person.parotid_size, person.submandibular_size, strict=True):
        rows = (
            (26, 61, -5, 4.5, 7.5), (20, 59, -2, 8.5, 12.5), (10, 56, 0.5, 13, 16.5), (0, 55.5, 1.2, 13.5, 17),
            (-10, 54.5, 0.6, 12.2, 15.5), (-20, 53, -1.5, 9, 12), (-28, 52, -3, 4, 6.5),
        )  # fmt: skip
        parotid: Shape = Loft(tuple((z, x, y, size * rx, size * ry) for z, x, y, rx, ry in rows))
        submandibular: Shape = Ellipsoid((31.5, -25, -36), (9.2 * small, 15.2 * small, 14.2 * small))
        if side == "R":
            parotid, submandibular = parotid.mirrored(), submandibular.mirrored()
        yield Part(parotid, (rind, (0, person.parotid_hu)), f"Parotid_{side}", grain=22)
        yield Part(submandibular, (rind, (0, SUBMANDIBULAR)), f"Submandibular_{side}", grain=10)
    thyroid_lobe = Tube(((15, -10, -90, 4), (16, -3, -108, 8), (14, 3, -124, 5)), (0.9, 1.3, 1))
    isthmus = Tube(((-12, -10, -110, 4), (0, -15, -110, 3), (12, -10, -110, 4)), (1, 1, 2))
    yield from _both(thyroid_lobe, ((-1, -50), (0, THYROID)), grain=10)
    yield Part(isthmus, ((0, THYROID),))


def _jaw(person: Person) -> Iterator[Part]:
    t, turn = person.jaw_size, person.jaw_turn
    ramus = Loft((
        (-24, 44, -24, 5 * t, 12), (-12, 46, -24, 5 * t, 15), (8, 49.5, -24, 4.8 * t, 15.5), (24, 52, -21, 4.2 * t, 16),
    ))  # fmt: skip
    condyle = Tube(((52, -11, 20, 5), (53, -6, 34, 5), (53, -5, 37, 6)), (1.2, 0.9, 0.9))
    coronoid = Tube(((52, -30, 20, 5), (51, -33, 35, 2.5)))
    bodies = tuple(
        Tube((
            (side * 46, -18, -13, 5.2 * t), (side * 41, -40, -18, 5.9 * t), (side * 31 + 0.6 * turn, -61, -23, 6.1 * t),
            (side * 17 + turn, -76, -28, 6.1 * t), (turn, -81.5, -30, 6.5 * t),
        ), (1, 1, 2.05))
        for side in (LEFT, RIGHT)
    )  # fmt: skip
    mandible = Union((*_pair(ramus, condyle, coronoid).shapes, *bodies))
    yield Part(mandible, ((0, JAW_CORTEX), (2.6, 350)), "Mandible", grain=60)
    for low, high, shift in ((-12, 0, turn), (2, 14, 0.0)):
        yield Part(_dental_arch(low, high, radius=3.8, turn=shift), ((0, ENAMEL), (2.2, DENTINE)), grain=120)
    yield Part(Ellipsoid((28.0 * person.filled_side, -45, -3), (4, 4.5, 3.5)), ((0, FILLING),))


def _dental_arch(low: float, high: float, *, radius: float, turn: float = 0.0) -> Union:
    """A horseshoe between two heights; `turn` moves its front to the left."""
    z, tall = (low + high) / 2, (high - low) / 2 / radius + 0.35
    return Union(
        tuple(
            Tube((
                (turn, -76, z, radius), (side * 13 + turn, -72, z, radius), (side * 22 + turn / 2, -62, z, radius),
                (side * 27, -47, z, radius), (side * 30, -36, z, radius),
            ), (1, 1, tall))
            for side in (LEFT, RIGHT)
        )
    )  # fmt: skip
