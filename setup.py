"""The one step that pyproject.toml cannot say: the wheel holds the recipes of `search_spaces/`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    """In a checkout the code looks into the top-level folder, so an editable build copies none."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "ekd_ray", "search_spaces")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("search_spaces", target)


setup(cmdclass={"build_py": BuildWithRecipes})
