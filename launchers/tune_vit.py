# PYTHON_ARGCOMPLETE_OK
"""Search the best distillation of a CNN teacher into a vision transformer."""

from ekd_ray.cli import tune_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(tune_command, __doc__, home="vit")


if __name__ == "__main__":
    run(main)
