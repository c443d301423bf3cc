# PYTHON_ARGCOMPLETE_OK
"""Train the run of a bundle again and say whether the same came out."""

from __future__ import annotations

from ekd_ray import cli, flags


def main() -> int:
    args = flags.read(flags.reproduce_parser(__doc__))

    from ekd_ray import reproduce_command

    return reproduce_command.run(args)


if __name__ == "__main__":
    cli.run(main)
