"""The node's log: a line an event, and nothing of what an exception quotes."""

import logging

import pytest

from anatomynet.client.node_log import LOGGER, log, log_failure


@pytest.fixture(autouse=True)
def _listening_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    LOGGER.propagate = True
    caplog.set_level(logging.INFO, LOGGER.name)


def test_an_event_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log("refused", calling='EVIL\n" x', seconds=1.5, reason=None)
    assert caplog.messages == ['refused calling="EVIL \\" x" seconds=1.50']


def test_an_exception_is_its_type_and_place(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("Meier^Secret")
    except ValueError as error:
        log_failure(error)
    (line,) = caplog.messages
    assert line.startswith("failure error=ValueError at=test_node_log.py:")
    assert "Meier" not in line
