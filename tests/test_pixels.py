"""Stored pixels become Hounsfield units as pydicom's own arithmetic has it, padding becomes air."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_rescale

from anatomynet.client.pixels import AIR_HU
from anatomynet.client.study import read_ct_series, volume_from_series
from tests.dicom_studies import edit, write_study

WORDS = np.random.default_rng(7).integers(0, 65536, (8, 10), dtype=np.uint16)


def store(path: Path, words: NDArray[np.uint16], **changes: object) -> None:
    edit(path, PixelData=words.tobytes(), HighBit=int(str(changes.get("BitsStored", 16))) - 1, **changes)


def read(folder: Path) -> NDArray[np.int16]:
    return volume_from_series(read_ct_series(folder)).hu


def by_pydicom(path: Path) -> NDArray[np.int16]:
    dataset = pydicom.dcmread(path)
    hu = apply_rescale(dataset.pixel_array, dataset)
    rounded: NDArray[np.int16] = np.clip(np.rint(hu), -32768, 32767).astype(np.int16)
    return rounded


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("bits", [12, 13, 15, 16])
@pytest.mark.parametrize(
    ("slope", "intercept"), [(1, 0), (1, -1024), (1, 1000.5), (2, -8192), (0.25, -1000), (1, -32768), (1, 40000)]
)
def test_rescaled_as_pydicom_does(tmp_path: Path, signed: int, bits: int, slope: float, intercept: float) -> None:
    paths = write_study(tmp_path)
    words = WORDS & np.uint16((1 << bits) - 1)  # pydicom takes the words as they are: nothing above the stored bits
    if signed:
        words = ((words.astype(np.int32) ^ (1 << (bits - 1))) - (1 << (bits - 1))).astype(np.int16).view(np.uint16)
    for path in paths:
        store(
            path,
            words,
            BitsStored=bits,
            PixelRepresentation=signed,
            RescaleSlope=slope,
            RescaleIntercept=intercept,
        )
    hu = read(tmp_path)
    for plane, path in zip(hu, paths, strict=True):
        np.testing.assert_array_equal(plane, by_pydicom(path))


def test_every_slice_has_its_own_slope_and_intercept(tmp_path: Path) -> None:
    paths = write_study(tmp_path)
    for k, path in enumerate(paths):
        store(
            path,
            WORDS & np.uint16(0xFFF),
            BitsStored=12,
            PixelRepresentation=0,
            RescaleSlope=1 + k % 2,
            RescaleIntercept=-k,
        )
    for k, plane in enumerate(read(tmp_path)):
        np.testing.assert_array_equal(plane, (WORDS & 0xFFF).astype(int) * (1 + k % 2) - k)


@pytest.mark.parametrize(("signed", "expected"), [(0, [0x0FFF, 0x0001]), (1, [-1, 1])])
def test_bits_above_the_stored_ones_are_ignored(tmp_path: Path, signed: int, expected: list[int]) -> None:
    words = np.full((8, 10), 0xAFFF, np.uint16)
    words[:, ::2] = 0x5001
    for path in write_study(tmp_path):
        store(path, words, BitsStored=12, PixelRepresentation=signed)
    assert read(tmp_path)[0, 0, 1::-1].tolist() == expected


@pytest.mark.parametrize(
    ("signed", "padding", "limit", "padded"),
    [
        (1, -2000, None, [-2000]),
        (1, 63536, None, [-2000]),  # the unsigned word of -2000, as some writers give it
        (0, 0, None, [0]),
        (0, 63536, None, [63536]),
        (1, -2000, -1990, [-2000, -1995, -1990]),
        (1, -1990, -2000, [-2000, -1995, -1990]),
    ],
)
def test_padding_becomes_air(tmp_path: Path, signed: int, padding: int, limit: int | None, padded: list[int]) -> None:
    values = np.full(80, 100)
    values[: len(padded)] = padded
    words = (values & 0xFFFF).astype(np.uint16).reshape(8, 10)
    for path in write_study(tmp_path):
        store(path, words, PixelRepresentation=signed, RescaleIntercept=-24)
        dataset = pydicom.dcmread(path)
        vr = "SS" if padding < 0 else "US"
        dataset.add_new("PixelPaddingValue", vr, padding)
        if limit is not None:
            dataset.add_new("PixelPaddingRangeLimit", vr, limit)
        dataset.save_as(path)
    flat = read(tmp_path)[0].ravel()
    assert (flat[: len(padded)] == AIR_HU).all()
    assert (flat[len(padded) :] == 76).all()
