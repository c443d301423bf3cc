# PYTHON_ARGCOMPLETE_OK
"""Train a teacher (or any network alone) and keep its learned prior in its checkpoint."""

from __future__ import annotations

from ekd_ray.cli import flags, request
from ekd_ray.cli.main import run


def main() -> int:
    parser = flags.parser(__doc__, pair=False)
    parser.add_argument("--model", required=True, help="architecture to train")
    parser.add_argument(
        "--evidential", action="store_true", help="evidential cross-entropy with a learned prior"
    )
    parser.add_argument(
        "--test", action="store_true", help="read the test split once, after the last epoch"
    )
    flags.add_workers(parser)
    args = flags.read(parser)
    config = request.teacher_run_config(args)

    from ekd_ray.cli import distill_command

    return distill_command.train(config, args)


if __name__ == "__main__":
    run(main)
