"""Paths: many closed paths in one array come back one by one."""

import numpy as np

from anatomynet.client.paths import Paths, paths_of

TRIANGLE = np.array([[0, 0], [4, 0], [0, 3]])
SQUARE = np.array([[1, 1], [2, 1], [2, 2], [1, 2]])


def pairs(paths: Paths) -> list[tuple[int, list[list[int]]]]:
    return [(plane, points.tolist()) for plane, points in paths]


def test_what_goes_in_comes_out() -> None:
    paths = paths_of([(0, TRIANGLE), (5, SQUARE)])
    assert pairs(paths) == [(0, TRIANGLE.tolist()), (5, SQUARE.tolist())]
    assert paths.lengths.tolist() == [3, 4]


def test_the_last_point_of_each_leads_to_its_first() -> None:
    assert paths_of([(0, TRIANGLE), (0, SQUARE)]).following.tolist() == [1, 2, 0, 4, 5, 6, 3]


def test_points_are_left_out_of_each() -> None:
    kept = np.array([True, False, True, False, True, True, True])
    left = paths_of([(2, TRIANGLE), (3, SQUARE)]).only(kept)
    assert pairs(left) == [(2, TRIANGLE[[0, 2]].tolist()), (3, SQUARE[1:].tolist())]
