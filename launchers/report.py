# PYTHON_ARGCOMPLETE_OK
"""Write a study's report, one HTML file that needs no network; also while the study runs."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("report")
