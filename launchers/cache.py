# PYTHON_ARGCOMPLETE_OK
"""Look after the teacher cache: list its tables, fill one ahead, verify or remove them."""

from __future__ import annotations

from ekd_ray.cli import flags, request
from ekd_ray.cli.main import run


def main() -> int:
    args = flags.read(flags.cache_parser(__doc__))
    config = request.distill_config(args) if args.command == "fill" else None

    from ekd_ray.cli import cache_command

    return cache_command.run(args, config)


if __name__ == "__main__":
    run(main)
