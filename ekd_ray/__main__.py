# PYTHON_ARGCOMPLETE_OK
"""`python -m ekd_ray`, the same as `ekd-ray`."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main()
