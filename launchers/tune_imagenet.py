# PYTHON_ARGCOMPLETE_OK
"""Search the best distillation on ImageNet, or on image folders of its kind."""

from __future__ import annotations

from ekd_ray import cli, flags


def main() -> int:
    parser = flags.parser(__doc__, search=True, home="imagenet")
    args = flags.read(parser)
    configs = cli.study_configs(args)

    from ekd_ray import commands

    return commands.tune(configs, args)


if __name__ == "__main__":
    cli.run(main)
