# PYTHON_ARGCOMPLETE_OK
"""Export the confirmed winner of a study as a bundle: weights, configuration, evidence."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("export")
