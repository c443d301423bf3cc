"""One driver at a time: an object beside the study names it, and is renewed while it lives."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import asdict, dataclass, field, replace

from ekd_ray.errors import UserError
from ekd_ray.files import parse_json
from ekd_ray.remote.object_store import Store

LEASE, CLOCK = ".ekd_ray/driver.json", ".ekd_ray/clock"
# A driver that was not heard of for so long is dead, or cut off from the storage.
STALE_SECONDS = 180.0
# Two that begin at once both write, and both read again after this: the last one stays.
SETTLE_SECONDS = 1.0


class LeaseLost(Exception):
    """Another process drives the study now; the message says which."""


@dataclass(frozen=True)
class Lease:
    """`session` names the working copy that a process drives; `released` when it has ended."""

    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @classmethod
    def parse(cls, content: bytes | None) -> Lease | None:
        """None if there is no lease or a damaged one, as if nobody held it."""
        try:
            values = parse_json(content or b"")
            return cls(*(values[name] for name in cls.__dataclass_fields__))
        except (ValueError, TypeError, KeyError):
            return None

    def encode(self) -> bytes:
        """The content that `parse` reads."""
        return json.dumps(asdict(self)).encode()


def take_lease(store: Store, own: Lease, held: Lease | None) -> None:
    """Become the driver of a study, and see that no other process did so at the same moment.

    Args:
        own: of a working copy that no other process has locked.
        held: the lease that is there.

    Raises:
        UserError: another driver is at work. StorageError.
    """
    # The driver of the same working copy has ended: we hold its lock.
    if held and not held.released and held.session != own.session:
        # By the storage's own clock: those of two machines may differ by more than the bound.
        store.write(CLOCK, b"")
        now, renewed = store.stat(CLOCK), store.stat(LEASE)
        age = max(0.0, (now.changed - renewed.changed) / 1e9) if now and renewed else 0.0
        if age < STALE_SECONDS:
            raise UserError(
                f"{store.location} is being run by {held}, heard of {age:.0f} s ago: wait for it "
                f"or end it; if it is dead already, the study is free {STALE_SECONDS:.0f} s after "
                "its last word."
            )
    store.write(LEASE, own.encode())
    time.sleep(SETTLE_SECONDS)
    try:
        renew_lease(store, own)
    except LeaseLost as error:
        raise UserError(
            f"{store.location} was taken at the same moment by {error}: wait for it or end it."
        ) from None


def renew_lease(store: Store, own: Lease) -> None:
    """Say that this driver lives, or has ended.

    Raises:
        LeaseLost: another driver has taken over. StorageError.
    """
    found = Lease.parse(store.read(LEASE))
    if found and replace(found, released=own.released) != own:
        raise LeaseLost(str(found))
    store.write(LEASE, own.encode())
