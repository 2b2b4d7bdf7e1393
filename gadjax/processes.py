"""The processes of a run on several hosts: how they find each other, and how one of them leaves.

What jax does by itself where that fails is to end the process from inside, with a page of addresses. So what can be seen beforehand is
looked for, and what cannot is given up a little earlier than jax would.
"""

import errno
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax
from orbax.checkpoint.multihost import get_barrier_sync_fn

from gadjax.errors import Passing, UserError
from gadjax.terminal import console

# Of `jax.distributed`: "coordinator", "processes" and "process" as the command line has them.
COORDINATOR, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # jax's too: where process 0 listens, by default at that port for every address
FIND_WITHIN = 300.0  # seconds in which all processes have to be started
DEAD_AFTER = 60  # seconds without a sign of life from a process, after which the others end too
LEAVE_WITHIN = 30  # seconds between the ends of the first process and the last, after which something is wrong
FAIL_WITHIN = 8  # seconds in which all processes fail if they do so for the same reason


def start_processes() -> None:
    """Joins the other processes of the run, if there are any: before anything else is asked of jax.

    They are told of in the environment (the command line puts its options there), and on Cloud TPU by the machine itself. Where the
    others do not come, the process ends here, with status 1.

    Raises:
        UserError: the environment tells half of it, or an address that cannot be used; a `Passing` where it may be usable later.
    """
    told = [os.environ.get(name) for name in (COORDINATOR, PROCESSES, PROCESS)]
    join = partial(
        jax.distributed.initialize,
        initialization_timeout=2 * round(FIND_WITHIN),
        heartbeat_timeout_seconds=DEAD_AFTER,
        shutdown_timeout_seconds=LEAVE_WITHIN,
    )
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    if any(told):
        coordinator, count, index = _checked(*told)
        _check_address(coordinator, first=index == 0)
        with _given_up_after(FIND_WITHIN, f"the {count} processes that are to meet at {coordinator} are not all there"):
            join(coordinator, count, index)
    elif "tpu" in (jax.config.values["jax_platforms"] or "").split(","):  # which jax sets where it finds a TPU
        with _given_up_after(FIND_WITHIN, "the processes of this TPU's other hosts are not all there"):
            join()
    console.quiet = jax.distributed.is_initialized() and jax.process_index() != 0


def leave(status: int, last_words: str = "") -> None:
    """Ends the process with this status where it fails and the others do not; they would not leave together with it.

    The others lose sight of it then, and end too.

    Args:
        status: not 0.
        last_words: what is printed before the end.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    try:
        get_barrier_sync_fn()(key="gadjax leaves", timeout_ms=1000 * FAIL_WITHIN)
    except Exception:  # the barrier's own
        print(last_words, end="", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(status)


def _checked(coordinator: str | None, processes: str | None, process: str | None) -> tuple[str, int, int]:
    where = "--coordinator, --processes, --process"
    if not (coordinator and processes and process):
        raise UserError(where, "belong together", "give all three or none")
    try:
        count, index = int(processes), int(process)
    except ValueError:
        count, index = 0, 0
    port = re.fullmatch(r".+:([0-9]{1,5})", coordinator)
    if not (0 <= index < count and port and 0 < int(port[1]) < 1 << 16):
        what = f"{coordinator}, {processes}, {process} is no address and the number of one of so many processes"
        raise UserError(where, what, "write, for the first of two: --coordinator HOST:PORT --processes 2 --process 0")
    return coordinator, count, index


def _check_address(coordinator: str, first: bool) -> None:
    """Checks that there is such a host; and for process 0, whom the others ask, that no other program answers at the port."""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        kind = Passing if isinstance(error, OSError) and error.errno == socket.EAI_AGAIN else UserError
        what = f"there is no host {host} ({getattr(error, 'strerror', None) or error})"
        raise kind("--coordinator", what, "write the name or address of process 0's host") from error
    if first:
        _check_port(os.environ.get(BIND, f"[::]:{port}"))


def _check_port(bound: str) -> None:
    host, _, port = bound.rpartition(":")
    host = host.strip("[]")
    both = host == "::" and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ":" in host and (both or host != "::") else socket.AF_INET
    try:
        socket.create_server(("" if host == "::" else host, int(port)), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        kind = Passing if error.errno == errno.EADDRINUSE else UserError  # an earlier process may still be ending there
        raise kind("--coordinator", f"port {port} cannot be listened at ({error.strerror})", "choose another") from error


@contextmanager
def _given_up_after(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with status 1 if this is not left in time: what is waited for inside cannot be interrupted."""

    def give_up() -> None:
        print(f"gadjax: {message} after {seconds:.0f} s; start all of them, each with its own number", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
