"""Object storage in memory, that can be made to fail, and remembers how it looked."""

from __future__ import annotations

import math

from ekd_ray.remote.location import Location
from ekd_ray.remote.object_store import Stamp, StorageError

LOCATION = Location("s3", "bucket", "runs/one")


class FakeStore:
    """A `Store` whose clock is a counter of seconds.

    `moments` are its contents after each change; `calls` lists what was changed and fetched;
    `left` is how many calls will still be answered.
    """

    location = LOCATION

    def __init__(self, content=None):
        self.content = dict(content or {})
        self.now = 1_000_000
        self.changed = dict.fromkeys(self.content, self.now)
        self.moments, self.calls, self.left = [], [], math.inf

    def _ask(self):
        self.now += 1
        self.left -= 1
        if self.left < 0:
            raise StorageError(LOCATION, "no answer")

    def list_objects(self):
        self._ask()
        return {n: Stamp(len(c), self.changed[n] * 10**9) for n, c in self.content.items()}

    def stat(self, name):
        return self.list_objects().get(name)

    def read(self, name):
        self._ask()
        return self.content.get(name)

    def write(self, name, content):
        self._ask()
        self.content[name] = bytes(content)
        self.changed[name] = self.now
        self._remember("put", name)

    def download(self, name, path):
        self._ask()
        self.calls.append(("get", name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content[name])

    def delete(self, name):
        self._ask()
        self.content.pop(name, None)
        self._remember("delete", name)

    def _remember(self, what, name):
        self.calls.append((what, name))
        self.moments.append(dict(self.content))
