# PYTHON_ARGCOMPLETE_OK
"""Export the confirmed winner of a study as a bundle: weights, configuration, evidence."""

from ekd_ray.cli import export_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(export_command, __doc__)


if __name__ == "__main__":
    run(main)
