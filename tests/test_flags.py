"""What the findings and the border confidence tell of a poor agreement is counted by hand here."""

from benchmarks.flags import Drawn, lower_confidence_share, row_of


def larynx(confidence: float | None, *, poor: bool, flagged: bool = False) -> Drawn:
    return Drawn("Larynx", flagged, poor, confidence)


def test_each_structure_is_counted_in_one_of_four_fields() -> None:
    drawn = [
        *[larynx(0.9, poor=True, flagged=True)] * 1,
        *[larynx(0.9, poor=True)] * 2,
        *[larynx(0.9, poor=False, flagged=True)] * 3,
        *[larynx(0.9, poor=False)] * 4,
    ]
    row = row_of(drawn)
    assert row == {
        "poor, flagged": 1,
        "poor, not flagged": 2,
        "good, flagged": 3,
        "good, not flagged": 4,
        "poor has the lower confidence": 0.5,
    }


def test_confidence_is_judged_by_pairs_and_ties_count_half() -> None:
    drawn = [larynx(0.8, poor=True), larynx(0.8, poor=False), larynx(0.9, poor=False)]
    assert lower_confidence_share(drawn) == (0.5 + 1) / 2


def test_only_structures_of_one_kind_that_were_found_are_compared() -> None:
    other = Drawn("Mandible", False, False, 0.99)
    missed = larynx(None, poor=True)
    assert lower_confidence_share([other, missed, larynx(0.5, poor=True)]) is None
    assert lower_confidence_share([other, missed, larynx(0.5, poor=True), larynx(0.4, poor=False)]) == 0.0
