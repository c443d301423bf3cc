# PYTHON_ARGCOMPLETE_OK
"""Export the confirmed winner of a study as a bundle: weights, configuration, evidence."""

from __future__ import annotations

from ekd_ray.cli import flags
from ekd_ray.cli.main import run


def main() -> int:
    args = flags.read(flags.export_parser(__doc__))

    from ekd_ray.cli import export_command

    return export_command.export(args)


if __name__ == "__main__":
    run(main)
