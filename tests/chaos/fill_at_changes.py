"""Run as a script: whole studies without Ray or training, whose disk is full at a change of a file.

    python fill_at_changes.py FOLDER SEED COUNT

FOLDER lies on a small file system of its own. Before a chosen change of a study's folder (see
kill_at_changes.py) a file takes all the room there is, or all but some bytes; the study ends, the
file is removed, and the study is continued to its end and checked. With COUNT 0 every change has
its turn, else so many, drawn by SEED: first one of each kind, as far as COUNT goes. Prints one line
of JSON: how many ended with one sentence, how many without harm.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from agreement import check_ended, ended
from kill_at_changes import Changes, draw_changes, in_child, study

from ekd_ray.errors import UserError, halting_error
from ekd_ray.results import Study
from ekd_ray.studies import pipeline

SAID = 2  # exit code of a study that ended with one sentence
pipeline.LEAST_FREE_BYTES = 0  # the file system is smaller than a study asks for


class Fills(Changes):
    """Fills the disk before one of the changes, in place of killing the process."""

    def __init__(self, folder: Path, fill_at: int, left: int) -> None:
        self.fill_at, self.left = fill_at, left
        super().__init__(folder, None, 0)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        before = len(self.kinds)
        super()._hook(event, arguments)
        if before < len(self.kinds) == self.fill_at:
            fill(self.folder.parent, self.left)


def fill(disk: Path, left: int) -> None:
    """Write until nothing goes in, then give `left` bytes back."""
    with (disk / "filler").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        with contextlib.suppress(OSError):
            while file.write(bytes(256)):
                pass
        file.truncate(max(0, file.tell() - left))


def run_filled(out: Path, fill_at: int, left: int) -> int:
    """The study in a process of its own, as a launcher ends it: 0, or 2 after one sentence."""
    child = os.fork()
    if child == 0:
        code = 0
        try:
            Fills(out, fill_at, left)
            study(out)
        except UserError:
            code = SAID
        except BaseException as error:
            code = SAID if halting_error(error) else 1
            if code == 1:
                traceback.print_exc()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main(folder: Path, seed: int, count: int) -> None:
    draw, codes = random.Random(seed), Counter[int]()
    kinds, turns = draw_changes(folder, draw, count)
    for turn in turns:
        out, left = folder / f"{turn:04d}", draw.choice([0, 0, draw.randint(1, 50_000)])
        code = run_filled(out, turn, left)
        assert code in (0, SAID), f"change {turn} ({kinds[turn - 1]}), {left} bytes left"
        codes[code] += 1
        (folder / "filler").unlink(missing_ok=True)
        seen = ended(out)
        in_child(out, None)
        assert seen.items() <= ended(out).items(), f"change {turn}: a record was lost or changed"
        check_ended(out)
        assert {record.status for record in Study.load(out).records()} <= {"complete", "pruned"}
        shutil.rmtree(out)
    stopped, harmless = codes[SAID], codes[0]
    print(json.dumps({"kinds": len({*kinds}), "stopped": stopped, "harmless": harmless}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
