# PYTHON_ARGCOMPLETE_OK
"""Write a study's report, one HTML file that needs no network; also while the study runs."""

from __future__ import annotations

import argparse

from ekd_ray.cli import flags
from ekd_ray.cli.main import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a study")
    parser.add_argument("--out", metavar="FILE", help="where to (RUN/report/index.html)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    parser.add_argument("--json", action="store_true", help="the file's path as JSON")
    args = flags.read(parser)

    from ekd_ray.cli import show_command

    return show_command.report(args)


if __name__ == "__main__":
    run(main)
