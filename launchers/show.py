# PYTHON_ARGCOMPLETE_OK
"""Show a study in the terminal: status, leaderboard, best configuration, importance, failures."""

from __future__ import annotations

import argparse

from ekd_ray.cli import flags
from ekd_ray.cli.main import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a study, running or finished")
    parser.add_argument("--compare", metavar="RUN", help="another study beside it")
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    args = flags.read(parser)

    from ekd_ray.cli import show_command

    return show_command.show(args)


if __name__ == "__main__":
    run(main)
