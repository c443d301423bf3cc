# PYTHON_ARGCOMPLETE_OK
"""Search the best distillation of a CNN teacher into a vision transformer."""

from __future__ import annotations

from ekd_ray import cli, flags


def main() -> int:
    parser = flags.parser(__doc__, search=True, home="vit")
    args = flags.read(parser)
    configs = cli.study_configs(args)

    from ekd_ray import commands

    return commands.tune(configs, args)


if __name__ == "__main__":
    cli.run(main)
