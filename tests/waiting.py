"""What another process does happens a moment later than a test asks for it: waited for, not slept for."""

import time
from collections.abc import Callable

# On a busy machine too.
WAIT_TIMEOUT_S = 60


def wait_until(happened: Callable[[], object], what: str = "something") -> None:
    """Asks again and again; a test that waits for `what` in vain fails."""
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while not happened():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.02)
