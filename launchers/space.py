# PYTHON_ARGCOMPLETE_OK
"""Look at a search space before it costs anything: its ranges, sampled points, shared settings."""

from __future__ import annotations

from ekd_ray import cli, flags


def main() -> int:
    args = flags.read(flags.space_parser(__doc__))

    from ekd_ray import commands

    return commands.show_space(cli.recipe_config(args), args)


if __name__ == "__main__":
    cli.run(main)
