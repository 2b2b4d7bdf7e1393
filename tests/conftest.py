"""What holds for every test: 8 fake CPU devices, strict numerics, no network.

The environment is set before jax is imported, so that processes which a test starts get it too.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compilation, and most of that what makes programs faster than a test needs.
# With JAX_DISABLE_MOST_OPTIMIZATIONS=0 the programs are those that users have.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    f" --xla_cpu_use_fusion_emitters={int(os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] == '0')}"
)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest
from hypothesis import settings

PACKAGE = Path(__file__).parent.parent / "gadjax"
STRICT = {"losses", "projection", *(path.stem for folder in ("models", "rollout") for path in (PACKAGE / folder).glob("[!_]*.py"))}
LOOPBACK = {"", None, "localhost", "127.0.0.1", "::1", b"localhost", b"127.0.0.1", b"::1"}

# No deadline: a first call compiles. Derandomized: a red test is red again.
settings.register_profile("gadjax", deadline=None, derandomize=True)
settings.load_profile("gadjax")


def refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Fails the test that looks up or calls any host but this one."""
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else ""  # others are local: Unix sockets, netlink
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host not in LOOPBACK:
        pytest.fail(f"a test must not use the network: {event} {host}")


sys.addaudithook(refuse_network)


@pytest.fixture(autouse=True)
def strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Mixed dtypes raise in the tests of losses, of models/ and of rollout/; optax's own updates need them elsewhere."""
    subject = request.module.__name__.rpartition("test_")[2]
    with jax.numpy_dtype_promotion("strict") if subject in STRICT else nullcontext():
        yield
