# PYTHON_ARGCOMPLETE_OK
"""Train one configuration, without a search: one student from one teacher."""

from __future__ import annotations

from ekd_ray.cli import flags, request
from ekd_ray.cli.main import run


def main() -> int:
    parser = flags.parser(__doc__)
    parser.add_argument("--config", metavar="FILE", help="a distill.yaml to start from")
    parser.add_argument(
        "--test", action="store_true", help="read the test split once, after the last epoch"
    )
    flags.add_workers(parser)
    args = flags.read(parser)
    config = request.distill_config(args)

    from ekd_ray.cli import distill_command

    return distill_command.train(config, args)


if __name__ == "__main__":
    run(main)
