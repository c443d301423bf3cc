# PYTHON_ARGCOMPLETE_OK
"""Show a study in the terminal: status, leaderboard, best configuration, importance, failures."""

from ekd_ray.cli import show_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(show_command, __doc__)


if __name__ == "__main__":
    run(main)
