# PYTHON_ARGCOMPLETE_OK
"""Train the run of a bundle again and say whether the same came out."""

from ekd_ray.cli import reproduce_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(reproduce_command, __doc__)


if __name__ == "__main__":
    run(main)
