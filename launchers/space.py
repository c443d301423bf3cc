# PYTHON_ARGCOMPLETE_OK
"""Look at a search space before it costs anything: its ranges, sampled points, shared settings."""

from ekd_ray.cli import space_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(space_command, __doc__)


if __name__ == "__main__":
    run(main)
