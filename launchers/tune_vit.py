# PYTHON_ARGCOMPLETE_OK
"""Search the best distillation of a CNN teacher into a vision transformer."""

from __future__ import annotations

from ekd_ray.cli import flags, request
from ekd_ray.cli.main import run


def main() -> int:
    parser = flags.parser(__doc__, search=True, home="vit")
    args = flags.read(parser)
    configs = request.study_configs(args)

    from ekd_ray.cli import tune_command

    return tune_command.tune(configs, args)


if __name__ == "__main__":
    run(main)
