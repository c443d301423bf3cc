# PYTHON_ARGCOMPLETE_OK
"""Export the confirmed winner of a study as a bundle: weights, configuration, evidence."""

from __future__ import annotations

from ekd_ray import cli, flags


def main() -> int:
    args = flags.read(flags.export_parser(__doc__))

    from ekd_ray import commands

    return commands.export(args)


if __name__ == "__main__":
    cli.run(main)
