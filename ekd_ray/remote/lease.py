"""Who drives the study at a URI: one object there, renewed while that process lives."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, replace

from ekd_ray.errors import UserError
from ekd_ray.remote.location import Location
from ekd_ray.remote.objects import Objects

OWN = ".ekd_ray/"  # what is below it is about the copy, not part of the study
LEASE = f"{OWN}driver.json"
_PROBE = f"{OWN}clock-"
# A driver that was not heard of for so long is dead, or cut off from the storage.
STALE_SECONDS = 180.0
# Two that begin at once both write, and both read again after this: the last one stays.
SETTLE_SECONDS = 1.0


class LeaseLost(Exception):
    """Somebody else drives the study now; the message says who."""


@dataclass(frozen=True)
class Lease:
    """`session` names one driver's stay, from its beginning to its end; `released` at its end."""

    session: str
    host: str
    pid: int
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def new_lease() -> Lease:
    """This process's."""
    return Lease(session=uuid.uuid4().hex, host=socket.gethostname(), pid=os.getpid())


def read_lease(objects: Objects) -> Lease | None:
    """The last driver of a study, None if there was none. Raises StorageError."""
    content = objects.read(LEASE)
    if content is None:
        return None
    try:
        values = json.loads(content)
        return Lease(**{name: values[name] for name in Lease.__dataclass_fields__})
    except (ValueError, TypeError, KeyError):  # not ours: as if nobody held it
        return None


def check_free(objects: Objects, location: Location, held: Lease | None) -> None:
    """Raises `UserError` if another driver is at work. Raises StorageError."""
    if held is None or held.released:
        return
    here = held.host == socket.gethostname()
    if here and not _alive(held.pid):
        return
    heard = objects.entries()[LEASE].changed
    # By the storage's own clock: those of two machines may differ by more than the bound.
    probe = f"{_PROBE}{uuid.uuid4().hex}"
    objects.write(probe, b"")
    now = objects.entries()[probe].changed
    objects.delete(probe)
    age = (now - heard) / 1e9
    if age < STALE_SECONDS:
        raise UserError(
            f"{location} is being run by {held}, heard of {age:.0f} s ago: wait for it or end it; "
            f"if it is dead already, the study is free {STALE_SECONDS:.0f} s after its last word."
        )


def take(objects: Objects, location: Location, own: Lease) -> None:
    """Write the lease, and see that no other driver did so at the same moment.

    Raises:
        UserError: one did. StorageError: it cannot be written.
    """
    _write(objects, own)
    time.sleep(SETTLE_SECONDS)
    found = read_lease(objects)
    if found is None or found.session != own.session:
        raise UserError(
            f"{location} was taken at the same moment by {found or 'another process'}: wait for "
            "it or end it."
        )


def renew(objects: Objects, own: Lease, *, released: bool = False) -> None:
    """Say that this driver lives, or that it has ended.

    Raises:
        LeaseLost: another driver has taken over. StorageError.
    """
    found = read_lease(objects)
    if found is not None and found.session != own.session:
        raise LeaseLost(str(found))
    _write(objects, replace(own, released=released))


def _write(objects: Objects, lease: Lease) -> None:
    objects.write(LEASE, json.dumps(asdict(lease)).encode())


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
