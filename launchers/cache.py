# PYTHON_ARGCOMPLETE_OK
"""Look after the teacher cache: list its tables, fill one ahead, verify or remove them."""

from ekd_ray.cli import cache_command
from ekd_ray.cli.main import run, run_command


def main() -> int:
    return run_command(cache_command, __doc__)


if __name__ == "__main__":
    run(main)
