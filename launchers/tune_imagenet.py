# PYTHON_ARGCOMPLETE_OK
"""Search the best distillation on ImageNet; `--dataset` names other pictures."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("tune", home="imagenet")
