"""The phantom's table of anatomy: every organ, bone and space of one person, in the order in which it is painted.

Stands between the shapes (engine.phantom_shapes) and the painter (engine.phantom). The anatomy's frame is LPS in mm
with its origin midway between the parotid glands: the skull's vertex lies at z = 159, the chin at z = -40, the top of
the breastbone at z = -125. Positions and sizes follow the means of clinical contours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from anatomynet.engine.phantom_shapes import Common, Ellipsoid, HalfSpace, Loft, Shape, Triple, Tube, Union

VERTEX_Z = 159.0
FEET_END_Z = -330.0  # the anatomy goes no further down
LEFT, RIGHT = 1, -1  # the sign of x
SIDES = (LEFT, RIGHT)

# Hounsfield units
AIR, LUNG, FOAM = -1000, -820, -960
FAT, SKIN, MUSCLE, VESSEL, TONGUE = -98, 15, 52, 48, 48
CORTICAL, DENSE, CANCELLOUS, DISC, CARTILAGE = 1000, 700, 280, 85, 130
CSF, BRAIN, WHITE, STEM, CORD = 8, 37, 31, 33, 40
VITREOUS, SCLERA, LENS, NERVE = 5, 55, 85, 35
SUBMANDIBULAR, THYROID, GULLET = 40, 105, 38
ENAMEL, FILLING = 1900, 3000

# The spinal cord's centre and the oesophagus's: y over z, mm. The rest of neck and chest hangs on the first.
CORD_Z = (30, 12, 0, -20, -40, -60, -80, -100, -120, -140, -160, -180, -200, FEET_END_Z)
CORD_Y = (25.0, 26.0, 25.5, 26.0, 29.0, 33.4, 38.6, 45.5, 54.0, 63.5, 72.0, 81.0, 89.0, 112.0)
GULLET_Z = (-97, -110, -120, -140, -160, -180, -200, FEET_END_Z)
GULLET_Y = (12.5, 16.0, 20.5, 27.5, 34.0, 41.0, 47.0, 68.0)
# The lung's outer wall: z, |x| of its lateral face, its radii in x and y, mm.
LUNG_WALL = (
    (-112.0, 48.0, 5.0, 8.0),
    (-118, 66, 19, 22),
    (-130, 84, 31, 36),
    (-150, 103, 42, 52),
    (-180, 120, 52, 68),
    (FEET_END_Z, 132, 58, 84),
)
# Centre of each vertebra from C1 down, z mm.
VERTEBRAE_Z = (7, -11, -30, -47, -64, -81, -99, -118, -138, -159, -181, -204, -228, -253, -279, -306)


@dataclass(frozen=True)
class Part:
    """One stroke of the painter.

    Attributes:
        shape: what is painted.
        layers: (depth under the surface in mm, Hounsfield units), outermost first; a depth below zero lies outside.
        label: name of the structure whose contour the shape's surface is; empty for none.
        grain: standard deviation of the tissue's own texture, HU.
    """

    shape: Shape
    layers: tuple[tuple[float, float], ...] = ()
    label: str = ""
    grain: float = 0.0


@dataclass(frozen=True)
class Person:
    """What differs between people beside size and posture (engine.phantom.Posture); pairs are (left, right).

    Attributes:
        fat_mm: under the skin of the trunk; less in the face.
        parotid_size: of each gland's cross-section, 1 is the mean.
        parotid_hu: the glands' own, lower where fat has grown into them.
        submandibular_size: of each gland's radii.
        maxillary_sinus: of each sinus's radii; its asymmetry marks the side.
        filled_side: where a lower molar carries a metal filling, LEFT or RIGHT.
        jaw_size: thickness of the mandible.
        jaw_turn: lateral deviation of the chin, mm to the left.
        larynx_size: of its cross-section.
        vessel_hu: contrast agent raises it.
        couch: distance of the couch's middle from the patient's, and its depth behind the back, mm.
    """

    fat_mm: float = 8.0
    parotid_size: tuple[float, float] = (1.0, 1.0)
    parotid_hu: float = 5.0
    submandibular_size: tuple[float, float] = (1.0, 1.0)
    maxillary_sinus: tuple[float, float] = (1.0, 0.85)
    filled_side: int = LEFT
    jaw_size: float = 1.0
    jaw_turn: float = 0.0
    larynx_size: float = 1.0
    vessel_hu: float = VESSEL
    couch: tuple[float, float] = (0.0, 3.0)


def parts_of(person: Person) -> list[Part]:
    """Every part of a person, in the order in which it must be painted: later parts cover earlier ones."""
    groups = (_couch, _skin, _muscles, _chest, _vessels, _spine, _skull, _brain, _face, _orbits, _airway, _glands, _jaw)
    return [part for group in groups for part in group(person)]


def cord_y(z: float) -> float:
    """Where the spinal cord runs, y in mm."""
    return float(np.interp(z, CORD_Z[::-1], CORD_Y[::-1]))


def _on(side: int, *points: Triple) -> tuple[Triple, ...]:
    return tuple((side * x, y, z) for x, y, z in points)


def _ball(side: int, centre: Triple, radii: Triple, *, boxy: bool = False) -> Ellipsoid:
    return Ellipsoid(_on(side, centre)[0], radii, boxy)


def _column(zs: tuple[float, ...], ys: tuple[float, ...], radii: tuple[float, float], x: float = 0.0) -> Loft:
    return Loft(tuple((z, x, y, *radii) for z, y in zip(zs, ys, strict=True)))


def _bone(shape: Shape, rim: float = 1.5, *, label: str = "", core: float = CANCELLOUS) -> Part:
    return Part(shape, ((0, CORTICAL), (rim, core)), label, grain=30)


def _couch(person: Person) -> Iterator[Part]:
    x, depth = person.couch
    yield Part(Ellipsoid((x, 166 + depth, -90), (265, 13, 600), boxy=True), ((0, -120), (2.5, FOAM)))
    yield Part(Ellipsoid((x, 133 + depth, 45), (105, 21, 95), boxy=True), ((0, -940),))


def _skin(person: Person) -> Iterator[Part]:
    cranium = Ellipsoid((0, 14, 72), (76, 97, VERTEX_Z - 72))
    neck = Loft(
        (
            (62, 0, 17, 70, 90),
            (40, 0, 18, 73, 87),
            (20, 0, 18, 75, 78),
            (0, 0, 17, 76, 70),
            (-20, 0, 20, 70, 63),
            (-40, 0, 22, 66, 58),
            (-60, 0, 26, 66, 63),
            (-75, 0, 32, 75, 68),
            (-95, 0, 45, 100, 74),
            (-120, 0, 53, 140, 81),
            (-140, 0, 54, 160, 90),
            (-170, 0, 49, 170, 99),
            (-200, 0, 41, 172, 108),
            (FEET_END_Z, 0, 35, 172, 118),
        )
    )
    face = Loft(
        (
            (80, 0, -30, 48, 44),
            (60, 0, -22, 66, 64),
            (30, 0, -12, 69, 77),
            (0, 0, -10, 67, 84),
            (-20, 0, -10, 62, 85),
            (-32, 0, -12, 57, 82),
            (-42, 0, -10, 52, 74),
            (-49, 0, -8, 48, 62),
            (-58, 0, -4, 46, 50),
            (-72, 0, 0, 46, 44),
        )
    )
    nose = Tube(((0, -82, 66), (0, -97, 44), (0, -92, 36)), (7, 11, 12))
    shoulders = [
        Tube(
            _on(side, (40, 64, -103), (113, 66, -120), (163, 70, -134), (190, 73, -152), (197, 78, FEET_END_Z)),
            (42, 40, 44, 46, 47),
        )
        for side in SIDES
    ]
    girdle = Loft(
        (
            (-104, 0, 66, 100, 34),
            (-120, 0, 67, 170, 46),
            (-150, 0, 69, 212, 58),
            (-200, 0, 66, 222, 64),
            (FEET_END_Z, 0, 64, 222, 66),
        ),
        boxy=True,
    )
    ears = [Tube(_on(side, (71, 8, 12), (77, 16, 28), (78, 18, 42)), (4, 6, 5), (0.7, 1.6, 1.3)) for side in SIDES]
    body = Union((cranium, neck, face, nose, girdle, *shoulders))
    deep = person.fat_mm
    yield Part(Union(tuple(ears)), ((0, -30),))
    yield Part(body, ((0, SKIN), (1.8, FAT), (deep, MUSCLE), (deep + 7, -30), (deep + 8.5, MUSCLE)), grain=12)


def _muscles(person: Person) -> Iterator[Part]:
    fascia = ((-1.6, FAT), (0, MUSCLE))
    chest = Loft(
        (
            (-108, 0, 50, 70, 50),
            (-125, 0, 50, 118, 62),
            (-145, 0, 50, 132, 78),
            (-180, 0, 46, 145, 92),
            (FEET_END_Z, 0, 36, 150, 105),
        )
    )
    yield Part(chest, ((0, MUSCLE),))
    for side in SIDES:
        # Fat of the posterior triangle and above the clavicle, then what runs through it.
        yield Part(
            Tube(_on(side, (52, 30, -40), (62, 38, -75), (88, 35, -105)), (5, 11, 20), (1, 1.1, 1)),
            ((0, FAT), (3, -85)),
        )
        yield Part(
            Tube(
                _on(side, (26, 46, 2), (24, 62, -45), (26, 82, -95), (30, 108, -170), (30, 128, FEET_END_Z)),
                (15, 18, 19, 22, 24),
            ),
            fascia,
        )
        yield Part(Tube(_on(side, (43, 38, -2), (43, 46, -60), (60, 62, -100)), (8, 10, 12)), fascia)
        yield Part(Tube(_on(side, (27, 18, -35), (28, 26, -80), (40, 30, -115)), (7, 8, 9)), fascia)
        yield Part(
            Tube(_on(side, (60, 27, 12), (53, 14, -45), (36, -4, -90), (12, -18, -124)), (8, 10, 9, 6), (1.0, 1.35, 1)),
            fascia,
        )
        yield Part(
            Tube(_on(side, (59, -36, 36), (57, -31, 5), (50, -22, -16)), (7, 8, 6), (0.8, 2.0, 1)), fascia
        )  # masseter
        yield Part(
            Tube(_on(side, (30, -24, 36), (38, -20, 5), (43, -16, -14)), (6, 8, 5), (0.8, 1.6, 1)), fascia
        )  # medial pterygoid
        yield Part(
            Tube(_on(side, (60, -22, 90), (58, -26, 55), (52, -32, 28)), (7, 9, 6), (0.7, 2.4, 1)), fascia
        )  # temporalis
        yield Part(Ellipsoid(_on(side, (46, -50, 14))[0], (12, 13, 20)), ((0, FAT),))  # buccal fat
        yield Part(
            Tube(_on(side, (30, -8, 34), (30, -2, 10), (32, 0, -20)), (5, 5.5, 3)), ((0, -70),)
        )  # parapharyngeal fat
    yield Part(Loft(((40, 0, 95, 2, 9), (-30, 0, 74, 2, 10), (-80, 0, 92, 3, 8))), ((0, -60),))  # nuchal septum


def _chest(person: Person) -> Iterator[Part]:
    for side in SIDES:
        lung = Loft(tuple((z, side * (x - r), 46, r, ry) for z, x, r, ry in LUNG_WALL))
        yield Part(lung, ((-2, MUSCLE), (0, LUNG)), grain=45)
        for z in VERTEBRAE_Z[7:14]:
            yield _bone(_rib(side, z), 1.5)
        clavicle = Tube(_on(side, (14, -9, -129), (52, -8, -124), (104, 18, -110), (152, 50, -102)), (9, 6, 5.5, 7))
        yield _bone(clavicle, 2)
        blade = Tube(_on(side, (160, 76, -128), (128, 108, -150), (98, 124, -230)), (8, 5, 3), (1, 1, 2.6))
        spine_of_scapula = Tube(_on(side, (162, 66, -106), (130, 108, -118), (88, 122, -132)), (6, 5, 4))
        yield _bone(Union((blade, spine_of_scapula)), 1.5)
        humerus = Tube(
            _on(side, (183, 66, -134), (186, 68, -142), (197, 72, -172), (201, 76, FEET_END_Z)), (23, 24, 13, 12)
        )
        yield _bone(humerus, 2.5, core=200)
    yield _bone(Tube(((0, -12, -132), (0, -32, -175), (0, -58, FEET_END_Z)), (9, 7, 7), (2.2, 0.8, 1)), 1.5)


def _rib(side: int, z: float) -> Tube:
    """From its vertebra round the lung, falling, towards the breastbone."""
    levels, reach, _, depth = np.array(LUNG_WALL[::-1]).T
    angles = np.radians((80, 62, 40, 15, -15, -45, -70))
    falls = np.array((-2, 2, 9, 18, 28, 38, 44)) * np.interp(z, (-160, -118), (1.0, 0.45))
    points = [(side * 20.0, cord_y(z) - 4, z)]
    for angle, fall in zip(angles, falls, strict=True):
        x, y = (np.interp(z - fall, levels, r) + 6 for r in (reach, depth))
        # Nearly a rectangle with round corners: the chest is flat in front and behind.
        across, along = (np.sign(c) * np.abs(c) ** 0.7 for c in (np.cos(angle), np.sin(angle)))
        points.append((float(side * x * across), float(46 + y * along), float(z - fall)))
    return Tube(tuple(points), (4.2,) * len(points), (1, 1, 1.3))


def _vessels(person: Person) -> Iterator[Part]:
    blood = ((-1.2, -70), (0, person.vessel_hu))
    for side in SIDES:
        yield Part(
            Tube(_on(side, (26, 8, 20), (27, 6, -40), (23, 4, -80), (16, 4, -125)), (3, 4, 3.5, 4)), blood
        )  # carotid
        yield Part(
            Tube(_on(side, (32, 12, 20), (36, 10, -40), (33, 4, -80), (22, -4, -128)), (4, 6, 6.5, 7)), blood
        )  # jugular
        yield Part(Tube(_on(side, (20, 0, -130), (60, 20, -128), (110, 30, -130)), (6, 5, 4)), blood)  # subclavian
    yield Part(
        Loft(((-128, 0, 8, 24, 22), (-150, 0, 8, 30, 30), (-180, 3, 6, 34, 44), (FEET_END_Z, 10, 0, 52, 60))),
        ((0, -80),),
    )
    yield Part(Tube(((-8, -6, -145), (-4, -8, -190), (0, -6, FEET_END_Z)), (13, 17, 30)), blood)
    yield Part(
        Tube(((-4, -2, -188), (10, 20, -184), (20, 56, -196), (22, 78, FEET_END_Z)), (12, 12, 12, 12)), blood
    )  # aortic arch


def _spine(person: Person) -> Iterator[Part]:
    tract = tuple(y - 16 for y in CORD_Y[2:])
    yield Part(_column(CORD_Z[2:], tract, (10, 8)), ((0, DISC),))
    for number, z in enumerate(VERTEBRAE_Z):
        yield from _vertebra(number, float(z))
    yield _bone(Tube(((0, 14.5, -12), (0, 12.5, 12)), (5.5, 4.5)), 1.5)  # dens
    canal = Union((_column(CORD_Z, CORD_Y, (11.5, 8.2)),))
    yield Part(canal, ((0, -20), (1.5, CSF)))
    yield Part(_column(CORD_Z, CORD_Y, (7.0, 5.2)), ((0, CORD),))
    yield Part(_column(CORD_Z[1:], CORD_Y[1:], (7.8, 6.2)), label="SpinalCord")


def _vertebra(number: int, z: float) -> Iterator[Part]:
    """Body, arch, articular pillars, transverse processes and spinous process of C1 (0), C2 (1), ..."""
    y, thoracic = cord_y(z), max(0.0, min(1.0, (number - 6) / 3))
    height = 7.3 + 3.5 * thoracic
    if number > 0:
        body = Ellipsoid((0, y - 17 - 2 * thoracic, z), (11.5 + 3 * thoracic, 8.5 + 3.5 * thoracic, height), boxy=True)
        yield _bone(body, 1.2)
    arch = Ellipsoid((0, y + 1, z - 1), (17.5 if number else 20.0, 13.5, 5.5 if number else 4.5), boxy=True)
    yield _bone(arch, 1.5)
    for side in SIDES:
        lateral = 21.0 if number < 1 else 17.5
        yield _bone(_ball(side, (lateral, y - 5, z), (7.5, 8, 8.5 if number else 7), boxy=True), 1.5)
        tip = (33.0, y - 6, z) if number < 1 else (26 + 6 * thoracic, y - 8 + 12 * thoracic, z - 2)
        yield _bone(Tube(_on(side, (lateral, y - 5, z), tip), (5, 3.5)), 1.5)
    length = (5.0, 24.0, 20.0, 20.0, 24.0, 30.0, 38.0)[min(number, 6)]
    spinous = Tube(((0, y + 11, z - 2), (0, y + 11 + length, z - 6 - 8 * thoracic)), (4, 3.2), (1, 1, 1.5))
    yield _bone(spinous, 1.5)


def _skull(person: Person) -> Iterator[Part]:
    cells = ((0, CORTICAL), (2.5, -350))
    cavity = _cranial_cavity()
    yield Part(cavity, ((-6.5, CORTICAL), (-4.7, 450), (-2.3, CORTICAL), (0, CSF), (1.5, BRAIN)))
    for side in SIDES:
        petrous = Tube(_on(side, (14, 0, 46), (34, 9, 38), (56, 19, 34)), (5, 9, 11), (1, 1, 1.1))
        yield Part(petrous, ((0, CORTICAL), (3, DENSE)), grain=80)
        mastoid = Tube(_on(side, (56, 21, 34), (57, 24, 14)), (11, 7), (1, 1.2, 1))
        yield Part(mastoid, cells, grain=220)
        yield Part(Tube(_on(side, (74, 12, 28), (50, 10, 32)), (3.2, 3.0)), ((0, AIR),))  # ear canal
        wing = Tube(_on(side, (10, -22, 74), (34, -28, 76), (56, -32, 76)), (4, 4, 4))
        yield Part(wing, ((0, DENSE),))
        yield _bone(Tube(_on(side, (11, 16, 18), (17, 20, 13)), (7, 7)), 1.5)  # occipital condyle
    yield _bone(Tube(((0, -10, 62), (0, 1, 42), (0, 11, 20)), (9, 8, 6), (1.6, 1, 1)), 1.8, core=350)  # clivus
    yield _bone(Tube(((0, -42, 68), (0, -10, 62)), (12, 13), (1.3, 1, 0.9)), 1.5, core=350)  # sphenoid
    foramen = Loft(((-2, 0, 25.6, 14, 12), (14, 0, 26.5, 15, 14), (24, 0, 28, 17, 17)))
    yield Part(foramen, ((0, CSF),))


def _cranial_cavity() -> Shape:
    """Over a floor that falls from the roof of the orbits to the foramen magnum."""
    return Common((Ellipsoid((0, 14, 72), (65, 84, 76)), HalfSpace((0, 27, 15), (0, -0.61, -0.79))))


def _brain(person: Person) -> Iterator[Part]:
    for side in SIDES:
        yield Part(_ball(side, (29, 8, 98), (24, 58, 26)), ((0, WHITE),))
        yield Part(Tube(_on(side, (9, -22, 102), (11, 8, 106), (22, 42, 98), (26, 24, 84)), (5, 4, 6, 3)), ((0, CSF),))
    yield Part(Tube(((0, 0, 92), (0, 24, 88)), (2.5, 2.5)), ((0, CSF),))  # third ventricle
    yield Part(Loft(((36, 0, 40, 6, 4), (44, 0, 37, 8, 5), (54, 0, 32, 4, 4))), ((0, CSF),))  # fourth ventricle
    yield Part(Loft(((10, 0, 24, 14, 10), (30, 0, 20, 17, 12), (50, 0, 15, 19, 14), (74, 0, 8, 17, 14))), ((0, CSF),))
    stem = Loft(
        (
            (12.2, 0, 26.0, 7.9, 7.0),
            (20, 0, 26.2, 9.2, 7.9),
            (30, 0, 24.5, 10.6, 9.6),
            (38, 0, 22.5, 13.8, 11.6),
            (50, 0, 19, 16, 13.6),
            (60, 0, 17, 16.2, 14.0),
            (71, 0, 17, 15, 12.6),
        )
    )
    yield Part(stem, ((0, STEM),), "BrainStem")
    yield Part(Tube(((0, 34, 66), (0, 80, 62)), (2, 3), (14, 1, 1)), ((0, BRAIN + 8),))  # tentorium


def _face(person: Person) -> Iterator[Part]:
    for side, size in zip(SIDES, person.maxillary_sinus, strict=True):
        yield Part(_ball(side, (27, -46, 43), (13 * size, 17 * size, 16 * size), boxy=True), ((-1.5, DENSE), (0, AIR)))
        arch = Tube(_on(side, (40, -64, 46), (58, -50, 45), (67, -22, 40), (64, 0, 38)), (7, 5.5, 3.2, 3.5))
        yield _bone(arch, 1.5)
        yield _bone(Tube(_on(side, (44, -62, 50), (47, -58, 66), (44, -60, 84)), (5, 4, 5)), 1.5)
        pterygoid_plate = Tube(_on(side, (13, -25, 44), (16, -21, 18)), (3, 2), (1, 2.2, 1))
        yield Part(pterygoid_plate, ((0, DENSE),))
    maxilla = Union(tuple(_arch_of_teeth(side, (15.0, 24.0), 5.5, 0) for side in SIDES))
    yield _bone(maxilla, 1.5)
    yield Part(Ellipsoid((0, -52, 24), (22, 26, 3), boxy=True), ((0, DENSE),))  # hard palate
    yield Part(Ellipsoid((0, -48, 44), (13, 34, 19), boxy=True), ((-1.2, DENSE), (0, AIR)))  # nasal cavity
    for side in SIDES:
        yield Part(Tube(_on(side, (6.5, -66, 34), (6.5, -26, 33)), (4.5, 5), (1, 1, 1.8)), ((0, 45),))  # turbinates
        yield Part(Tube(_on(side, (6, -58, 47), (6, -30, 46)), (3.5, 3.5), (1, 1, 1.9)), ((0, 45),))
    yield Part(Ellipsoid((0, -50, 44), (1.2, 30, 19), boxy=True), ((0, 250),))  # septum
    yield Part(Ellipsoid((0, -44, 68), (13, 20, 11), boxy=True), ((-1.2, DENSE), (0, -650)), grain=250)  # ethmoid
    yield Part(Ellipsoid((1, -17, 62), (12, 12, 10), boxy=True), ((-1.2, DENSE), (0, AIR)))  # sphenoid sinus
    yield Part(Ellipsoid((0, -1, 67.5), (6, 6, 5)), ((0, 45),))  # pituitary
    frontal = max(person.maxillary_sinus, key=abs)
    yield Part(
        Ellipsoid((7.0 * (1 if person.filled_side == LEFT else -1), -74, 88), (11 * frontal, 5, 10)),
        ((-2, CORTICAL), (0, AIR)),
    )
    yield Part(Tube(((0, -83, 68), (0, -91, 54)), (4, 2.5), (1.3, 1, 1)), ((0, DENSE),))  # nasal bones


def _arch_of_teeth(side: int, heights: tuple[float, float], radius: float, turn: float) -> Tube:
    z0, z1 = heights
    middle, tall = (z0 + z1) / 2, (z1 - z0) / 2 / radius + 0.35
    points = (
        (0.0 + side * turn, -79.0, middle),
        (13, -75, middle),
        (22, -64, middle),
        (27, -48, middle),
        (30, -36, middle),
    )
    return Tube(_on(side, *points), (radius,) * 5, (1, 1, tall))


def _orbits(person: Person) -> Iterator[Part]:
    for side in SIDES:
        orbit = Tube(_on(side, (31, -62, 68), (28, -42, 68), (17, -20, 68)), (17.5, 14, 4))
        yield Part(orbit, ((-2, DENSE), (0, FAT)))
    for side in SIDES:
        for end in ((28.0, -50, 78), (28, -50, 58), (20, -50, 68), (40, -50, 68)):  # rectus muscles
            yield Part(Tube(_on(side, (18, -22, 68), end), (2, 2.2)), ((0, 45),))
        yield Part(_ball(side, (31, -62, 68), (12.2, 12.2, 12.2)), ((0, SCLERA), (1.5, VITREOUS)))
        yield Part(_ball(side, (31, -70.5, 68), (4.6, 2.2, 4.6)), ((0, LENS),))
        name = "OpticNerve_L" if side == LEFT else "OpticNerve_R"
        path = _on(side, (30, -49.5, 68), (25, -36, 67), (17, -21, 69), (10, -10, 73), (7.5, -8, 74))
        yield Part(Tube(path, (2.3, 2.3, 2.4, 2.4, 2.4)), ((0, NERVE),), name)
    chiasm = Union(
        tuple(Tube(_on(side, (7, -7.5, 74), (0, -3, 74.5), (-8, 3, 75.5)), (2.5, 3.0, 2.4)) for side in SIDES)
    )
    yield Part(chiasm, ((-2, CSF), (0, NERVE)), "Chiasm")


def _airway(person: Person) -> Iterator[Part]:
    yield Part(Ellipsoid((0, -48, 0), (25, 28, 19)), ((-1, -60), (0, TONGUE)), grain=12)  # tongue
    yield Part(Tube(((0, -32, -20), (0, -62, -26)), (15, 11)), ((-1, -60), (0, MUSCLE)))  # floor of the mouth
    yield Part(Tube(((0, -70, 17), (0, -35, 20)), (2.0, 1.6), (6, 1, 1)), ((0, AIR),))  # gap over the tongue
    s = person.larynx_size
    larynx = Loft(
        (
            (-58, 0, -9, 15 * s, 14.5 * s),
            (-68, 0, -9, 16.4 * s, 15 * s),
            (-80, 0, -9, 15.6 * s, 16 * s),
            (-94, 0, -8, 13.5 * s, 14 * s),
        )
    )
    yield Part(larynx, ((0, 40),), "Larynx")
    shield = Loft(((-62, 0, -9, 14.5 * s, 14.5 * s), (-84, 0, -9, 13.5 * s, 14.5 * s)))
    front = HalfSpace((0, -3, -70), (0, 1, 0))
    yield Part(Common((shield, front)), ((0, CARTILAGE + 80), (2.8, 10)))
    yield Part(Loft(((-84, 0, -8, 12.5 * s, 12.5 * s), (-93, 0, -8, 12 * s, 12 * s))), ((0, CARTILAGE + 80), (2.5, 40)))
    for side in SIDES:
        yield Part(_ball(side, (6, -1, -76), (3, 3, 5)), ((0, 200),))  # arytenoid
        yield _bone(Tube(_on(side, (20, -2, -41), (15, -22, -44), (0, -31, -46)), (2, 2.8, 3.4)), 1.0)  # hyoid
    air = Loft(
        (
            (52, 0, -14, 10, 6),
            (44, 0, -11, 13, 10),
            (32, 0, -8, 14, 11),
            (18, 0, -3, 13, 7),
            (4, 0, -3, 11, 5),
            (-15, 0, -4, 12, 6),
            (-32, 0, -8, 14, 9),
            (-46, 0, -11, 14, 9),
            (-60, 0, -11, 10, 10),
            (-70, 0, -11, 6, 11),
            (-76, 0, -12, 2.6, 10),
            (-82, 0, -11, 6, 10),
            (-94, 0, -8, 8, 9),
            (-105, 0, -4, 8.5, 8.5),
            (-120, 0, 5, 8.5, 8.5),
            (-140, 0, 12.5, 9, 8.5),
            (-160, -1, 19, 9, 8.5),
            (-185, -2, 27, 10, 8.5),
        )
    )
    yield Part(air, ((-1.5, 40), (0, AIR)))
    for side in SIDES:
        yield Part(Tube(_on(side, (2, 27, -184), (34, 36, -212)), (8, 6)), ((-1.5, 40), (0, AIR)))  # main bronchi
    yield Part(Tube(((0, -12, -58), (0, -17, -44), (0, -16, -36)), (2, 1.8, 1.5), (4, 1, 1)), ((0, 45),))  # epiglottis
    yield Part(Tube(((0, -28, 24), (0, -12, 14), (0, -9, 4)), (3.5, 4, 2.5), (3, 1, 1)), ((0, 48),))  # soft palate
    gullet = Loft(
        tuple((float(z), min(4.0, (-97 - z) / 12), y, 7.8, 5.8) for z, y in zip(GULLET_Z, GULLET_Y, strict=True))
    )
    yield Part(gullet, ((-1, -40), (0, GULLET)), "Esophagus")
    yield Part(Tube(((3, 24, -130), (3.5, 29, -143)), (1.8, 1.5), (1.6, 1, 1)), ((0, -600),))  # swallowed air


def _glands(person: Person) -> Iterator[Part]:
    rind = ((-1.8, FAT),)
    for side, size, small in zip(SIDES, person.parotid_size, person.submandibular_size, strict=True):
        suffix = "L" if side == LEFT else "R"
        rows = (
            (26.0, 61.0, -5.0, 4.5, 7.5),
            (20, 59, -2, 8.5, 12.5),
            (10, 56, 0.5, 13, 16.5),
            (0, 55.5, 1.2, 13.5, 17),
            (-10, 54.5, 0.6, 12.2, 15.5),
            (-20, 53, -1.5, 9, 12),
            (-28, 52, -3, 4, 6.5),
        )
        parotid = Loft(tuple((z, side * x, y, size * rx, size * ry) for z, x, y, rx, ry in rows))
        yield Part(parotid, (*rind, (0, person.parotid_hu)), f"Parotid_{suffix}", grain=22)
        gland = _ball(side, (31.5, -25, -36), (9.5 * small, 15.5 * small, 14.5 * small))
        yield Part(gland, (*rind, (0, SUBMANDIBULAR)), f"Submandibular_{suffix}", grain=10)
        yield Part(
            Tube(_on(side, (15, -10, -90), (16, -3, -108), (14, 3, -124)), (4, 8, 5), (0.9, 1.3, 1)),
            ((-1, -50), (0, THYROID)),
        )
    yield Part(Tube(((-12, -10, -110), (0, -15, -110), (12, -10, -110)), (4, 3, 4), (1, 1, 2)), ((0, THYROID),))


def _jaw(person: Person) -> Iterator[Part]:
    thick, turn = person.jaw_size, person.jaw_turn
    halves: list[Shape] = []
    for side in SIDES:
        ramus = Loft(
            (
                (-24, side * 44.0, -24, 5 * thick, 12),
                (-12, side * 46.0, -24, 5 * thick, 15),
                (8, side * 49.5, -24, 4.8 * thick, 15.5),
                (24, side * 52.0, -21, 4.2 * thick, 16),
            )
        )
        condyle = Tube(_on(side, (52, -11, 20), (53, -6, 34), (53, -5, 37)), (5, 5, 6), (1.2, 0.9, 0.9))
        coronoid = Tube(_on(side, (52, -30, 20), (51, -33, 35)), (5, 2.5))
        bow = (
            (46.0, -18.0, -13.0),
            (41, -40, -18),
            (31 + 0.6 * side * turn, -62, -23),
            (17 + side * turn, -79, -28),
            (side * turn, -85, -30),
        )
        body = Tube(_on(side, *bow), (5.2 * thick, 5.8 * thick, 6.0 * thick, 6.0 * thick, 6.4 * thick), (1, 1, 2.05))
        halves += [ramus, condyle, coronoid, body]
    yield Part(Union(tuple(halves)), ((0, 1300), (2.6, 350)), "Mandible", grain=60)
    for side in SIDES:
        yield Part(_arch_of_teeth(side, (-12, 0), 3.8, turn), ((0, ENAMEL), (2.2, 1200)))
        yield Part(_arch_of_teeth(side, (2.0, 14.0), 3.8, 0), ((0, ENAMEL), (2.2, 1200)))
    yield Part(Ellipsoid((28.0 * person.filled_side, -45, -3), (4, 4.5, 3.5)), ((0, FILLING),))
