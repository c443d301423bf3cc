# PYTHON_ARGCOMPLETE_OK
"""Search the best distillation on ImageNet, or on image folders of its kind."""

from ekd_ray.cli import tune_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(tune_command, __doc__, home="imagenet")


if __name__ == "__main__":
    run(main)
