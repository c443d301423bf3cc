# PYTHON_ARGCOMPLETE_OK
"""Search the best distillation of a CIFAR-sized teacher into a student, confirm and export it."""

from ekd_ray.cli import tune_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(tune_command, __doc__)


if __name__ == "__main__":
    run(main)
