"""Run as a script: commands that are forked from a process that has imported what they need.

Standard input has a line a command: a JSON object with its `log`, its `words` and the variables
that differ (`environment`). Standard output says its process id, and then its exit code.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import sys

# What a study imports on its way, the report aside.
MODULES = (
    "ray.tune", "ekd_ray.cli.tune_command", "ekd_ray.cli.request", "ekd_ray.cli.plan_text",
    "ekd_ray.cli.terminal", "ekd_ray.cli.study_text", "ekd_ray.studies.pipeline",
)  # fmt: skip


def run(log: str, words: list[str], environment: dict[str, str]) -> None:
    """Become the command, in a child."""
    os.setsid()
    for stream, path, flags in ((0, os.devnull, 0), (1, log, 1), (2, log, 1)):
        mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND if flags else os.O_RDONLY
        os.dup2(os.open(path, mode, 0o600), stream)
    os.environ.update(environment)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def main() -> None:
    for name in MODULES:
        importlib.import_module(name)
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        child = os.fork()
        if child == 0:
            run(**asked)
            sys.exit(0)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
