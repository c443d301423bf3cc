# PYTHON_ARGCOMPLETE_OK
"""Write a study's report, one HTML file that needs no network; also while the study runs."""

from ekd_ray.cli import report_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(report_command, __doc__)


if __name__ == "__main__":
    run(main)
