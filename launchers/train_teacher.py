# PYTHON_ARGCOMPLETE_OK
"""Train a teacher (or any network alone) and keep its learned prior in its checkpoint."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("train-teacher")
