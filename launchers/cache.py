# PYTHON_ARGCOMPLETE_OK
"""Look after the teacher cache: list its tables, fill one ahead, verify or remove them."""

from __future__ import annotations

from ekd_ray import cli, flags


def main() -> int:
    args = flags.read(flags.cache_parser(__doc__))
    config = cli.distill_config(args) if args.command == "fill" else None

    from ekd_ray import cache_commands

    return cache_commands.run(args, config)


if __name__ == "__main__":
    cli.run(main)
