# PYTHON_ARGCOMPLETE_OK
"""Look at a search space before it costs anything: its ranges, sampled points, shared settings."""

from __future__ import annotations

from ekd_ray.cli import flags, request
from ekd_ray.cli.main import run


def main() -> int:
    args = flags.read(flags.space_parser(__doc__))

    from ekd_ray.cli import space_command

    return space_command.show_space(request.recipe_config(args), args)


if __name__ == "__main__":
    run(main)
