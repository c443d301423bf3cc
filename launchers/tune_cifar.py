# PYTHON_ARGCOMPLETE_OK
"""Search the best distillation of a CIFAR-sized teacher into a student, confirm and export it."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("tune")
