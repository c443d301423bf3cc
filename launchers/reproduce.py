# PYTHON_ARGCOMPLETE_OK
"""Train the run of a bundle again and say whether the same came out."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("reproduce")
