# PYTHON_ARGCOMPLETE_OK
"""Train one configuration, without a search: one student from one teacher."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("distill")
