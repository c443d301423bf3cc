"""A trial without training, in a process that loads nothing for it."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

SPAN = "span.json"
HISTORY = "history.jsonl"  # as the engine's, which would load torch


def sleeper(config: dict[str, Any], *, seconds: float) -> None:
    """Sleep, write and report each epoch's row, as far as a search looks at it."""
    from ray import tune

    run = config["run"]
    folder, started = Path(run["folder"]), time.time()
    with open(folder / HISTORY, "a", encoding="utf-8") as history:
        for epoch in range(1, run["config"]["epochs"] + 1):
            time.sleep(seconds)
            loss = abs(math.log(run["config"]["lr"] / 0.01)) + 1 / epoch
            top1 = math.exp(-loss)
            row = {"epoch": epoch, "val_top1": top1, "train_loss": loss, "seconds": seconds}
            history.write(json.dumps(row) + "\n")
            history.flush()
            # Until where it has been at work: one that is stopped does not return.
            span = {"pid": os.getpid(), "started": started, "ended": time.time()}
            (folder / SPAN).write_text(json.dumps(span), encoding="utf-8")
            tune.report(row)
