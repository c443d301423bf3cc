"""Object storage in memory, that can be made to fail, and remembers how it looked."""

from __future__ import annotations

import os

from ekd_ray.remote.objects import Entry, StorageError


class FakeStore:
    """`Objects` whose clock is a counter of seconds.

    `moments` are its contents after each change; `down` makes every call fail; `calls` lists
    what was changed.
    """

    def __init__(self, content=None):
        self.content = dict(content or {})
        self.now = 1_000_000
        self.changed = dict.fromkeys(self.content, self.now)
        self.moments, self.calls, self.down = [], [], False

    def _ask(self):
        self.now += 1
        if self.down:
            raise StorageError("no answer")

    def entries(self):
        self._ask()
        return {n: Entry(len(c), self.changed[n] * 10**9) for n, c in self.content.items()}

    def read(self, name):
        self._ask()
        return self.content.get(name)

    def write(self, name, content):
        self._ask()
        self.content[name] = bytes(content)
        self.changed[name] = self.now
        self._remember("put", name)

    def upload(self, path, name):
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            self.write(name, file.read(state.st_size))
        return state

    def download(self, name, path):
        self._ask()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.content[name])

    def delete(self, name):
        self._ask()
        self.content.pop(name, None)
        self._remember("delete", name)

    def _remember(self, what, name):
        self.calls.append((what, name))
        self.moments.append(dict(self.content))
