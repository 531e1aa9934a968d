"""Copies configs/ into the wheel as igpt_jax/configs. All other settings of the package are in setup.cfg."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a checkout has configs/ beside the package
            configs = pathlib.Path(self.build_lib, "igpt_jax", "configs")
            configs.mkdir(parents=True, exist_ok=True)
            for file in pathlib.Path("configs").glob("*.py"):
                shutil.copy(file, configs)


setup(cmdclass={"build_py": BuildWithConfigs})
