"""Machines that are not like ours, made of this one: what a shell does before it runs a command."""

from __future__ import annotations

import contextlib
import functools
import socket
import subprocess
from collections.abc import Iterator

# The default of a container.
SMALL_SHM = "mount -t tmpfs -o size=64m tmpfs /dev/shm"
FEW_FILES = "ulimit -Sn 256"
PROXIES = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY"), "http://127.0.0.1:9"),
    "all_proxy": "socks5://127.0.0.1:9",
    "no_proxy": "",
}
DASHBOARD, GCS, CLIENT = 8265, 6379, 10001  # the ports that Ray takes if nobody says another


@functools.cache
def can_mount() -> bool:
    """Whether a process may have file systems of its own here."""
    try:
        done = subprocess.run(["unshare", "--mount", "sh", "-c", SMALL_SHM], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


def on_machine(*setup: str) -> tuple[str, ...]:
    """The words before a command that has it run there, as the same process."""
    apart = ("unshare", "--mount") if SMALL_SHM in setup else ()
    return (*apart, "sh", "-c", " && ".join([*setup, 'exec "$@"']), "sh")


@contextlib.contextmanager
def ports_taken() -> Iterator[None]:
    """Somebody else listens where Ray would."""
    with contextlib.ExitStack() as stack:
        for port in (DASHBOARD, GCS, CLIENT):
            with contextlib.suppress(OSError):  # somebody does so already
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
        yield
