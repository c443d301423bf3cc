# PYTHON_ARGCOMPLETE_OK
"""Train a teacher (or any network alone) and keep its learned prior in its checkpoint."""

from ekd_ray.cli import teacher_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(teacher_command, __doc__)


if __name__ == "__main__":
    run(main)
