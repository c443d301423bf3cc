# PYTHON_ARGCOMPLETE_OK
"""Train the run of a bundle again and say whether the same came out."""

from __future__ import annotations

from ekd_ray.cli import flags
from ekd_ray.cli.main import run


def main() -> int:
    args = flags.read(flags.reproduce_parser(__doc__))

    from ekd_ray.cli import reproduce_command

    return reproduce_command.run(args)


if __name__ == "__main__":
    run(main)
