# PYTHON_ARGCOMPLETE_OK
"""Look after the teacher cache: list its tables, fill one ahead, verify or remove them."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("cache")
