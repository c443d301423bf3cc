# PYTHON_ARGCOMPLETE_OK
"""Search the best distillation of a CNN teacher into a vision transformer."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("tune", home="vit")
