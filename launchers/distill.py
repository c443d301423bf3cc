# PYTHON_ARGCOMPLETE_OK
"""Train one configuration, without a search: one student from one teacher."""

from ekd_ray.cli import distill_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(distill_command, __doc__)


if __name__ == "__main__":
    run(main)
