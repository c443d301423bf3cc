# PYTHON_ARGCOMPLETE_OK
"""Show a study in the terminal: status, leaderboard, best configuration, importance, failures."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("show")
