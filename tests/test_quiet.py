"""What libraries tell of a file is not shown, whoever is at work beside."""

import logging
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from anatomynet.client.quiet import quiet_libraries

WAIT_S = 30


def inside(entered: threading.Event, leave: threading.Event) -> None:
    with quiet_libraries():
        entered.set()
        assert leave.wait(WAIT_S)


@pytest.mark.parametrize("first_to_leave", [0, 1])
def test_it_holds_until_the_last_thread_has_left(first_to_leave: int) -> None:
    logger = logging.getLogger("pydicom")
    level = logger.level
    entered, leave = ([threading.Event(), threading.Event()] for _ in range(2))
    with warnings.catch_warnings(record=True) as shown, ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("always")
        threads = []
        for number in range(2):
            threads.append(pool.submit(inside, entered[number], leave[number]))
            assert entered[number].wait(WAIT_S)
        leave[first_to_leave].set()
        threads[first_to_leave].result(WAIT_S)
        warnings.warn("a patient's name", stacklevel=1)
        assert not logger.isEnabledFor(logging.CRITICAL)
        leave[1 - first_to_leave].set()
        threads[1 - first_to_leave].result(WAIT_S)
        warnings.warn("a program's own", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["a program's own"]
    assert logger.level == level
