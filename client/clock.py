"""How long each stage of a study took, as the terminal and the report have it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Wall-clock seconds of each stage, in the order they ran.

    Attributes:
        seconds: stage -> seconds.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Counts the time spent inside under `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def summary(self) -> str:
        """One line: "read 0.41 s, infer 3.20 s, ... 4.1 s in all"."""
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
        return f"{stages}; {sum(self.seconds.values()):.1f} s in all"
