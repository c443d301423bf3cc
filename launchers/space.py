# PYTHON_ARGCOMPLETE_OK
"""Look at a search space before it costs anything: its ranges, sampled points, shared settings."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("space")
