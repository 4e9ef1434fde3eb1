"""A region holds a volume and its label map one after the other, as the server is told."""

import os
from pathlib import Path

import numpy as np
import pytest

from anatomynet.client.shared_memory import NotSharedError, SharedRegion

SHAPE = (3, 4, 5)


def volume() -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return np.random.default_rng(1808).integers(-1024, 3072, (6, 4, 10), dtype=np.int16)


def test_a_view_is_written_as_it_looks_and_labels_are_read_behind_it(tmp_path: Path) -> None:
    view = volume()[::-2, ::-1, 1::2]
    labels = np.arange(60, dtype=np.uint8).reshape(SHAPE)
    path = tmp_path / "region"
    path.write_bytes(bytes(120) + labels.tobytes())
    with path.open("r+b") as file:
        region = SharedRegion("", file.fileno(), SHAPE)
        assert (region.hu_bytes, region.label_bytes) == (120, 60)
        region.write(view)
        np.testing.assert_array_equal(region.read_labels(), labels)
    assert path.read_bytes() == view.tobytes() + labels.tobytes()


def test_too_little_memory_is_told() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(NotSharedError, match="No space left on device"):
            SharedRegion("", descriptor, SHAPE).write(volume()[::2, :, ::2])
    finally:
        os.close(descriptor)
