"""Where the time of a step goes: the seconds of its parts, and of what the host does beside them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Seconds of each part of a step, by metric name: the parts follow each other and make up the step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.host: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Gives the time since the last lap to `time/<name>_seconds`."""
        now = time.perf_counter()
        self.seconds[f"time/{name}_seconds"] = self.seconds.get(f"time/{name}_seconds", 0.0) + now - self._last
        self._last = now

    def skip(self) -> None:
        """Counts the time since the last lap nowhere: it was another step's."""
        self._last = time.perf_counter()

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Gives what is done within to `time/host/<name>_seconds`: it lies inside a part of the step, and is counted there as well."""
        begun = time.perf_counter()
        yield
        self.host[f"time/host/{name}_seconds"] = time.perf_counter() - begun
