# PYTHON_ARGCOMPLETE_OK
"""Search the best distillation on any data: `--data folder:PICTURES`, `hf:PATH` or a name."""

from ekd_ray.cli.main import main

if __name__ == "__main__":
    main("tune")
