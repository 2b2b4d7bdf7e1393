"""SIGTERM, which takes a machine away: what can be saved is saved, and the process ends in time, however far it is."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 10.0  # seconds for the step that is under way, after which it is given up
LIMIT = 18.0  # seconds after which the process ends; a run survives that at any time
STATUS = 128 + signal.SIGTERM  # as shells count


@contextmanager
def ends_in_time() -> Iterator[None]:
    """Ends the process `LIMIT` seconds after SIGTERM, even while it waits for a device and no handler of Python's can run."""
    seen, tell = socket.socketpair()
    tell.setblocking(False)
    left = threading.Event()
    before = signal.set_wakeup_fd(tell.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(seen, left), name="SIGTERM", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
        tell.close()


def _watch(seen: socket.socket, left: threading.Event) -> None:
    """Reads the numbers of signals as they come, until the other end is closed."""
    with seen:
        while number := seen.recv(1):
            if number[0] == signal.SIGTERM and not left.wait(LIMIT):
                os.write(2, b"gadjax: did not end in time; the same command goes on from the last checkpoint\n")
                os._exit(STATUS)


@contextmanager
def finishing() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM has come; it interrupts nothing for `GRACE` seconds while this is entered.

    It takes effect when this is left, or after that time, or when it comes again.
    """
    asked = threading.Event()
    timer = threading.Timer(GRACE, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and callable(before):
            before(number, frame)
        elif not asked.is_set():
            asked.set()
            timer.start()

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield asked.is_set
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    if asked.is_set():
        signal.raise_signal(signal.SIGTERM)
