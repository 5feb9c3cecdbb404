"""The part of the build that pyproject.toml cannot express: configs/ and examples/ become data of the package.

They lie beside the package in a checkout, and in its folder `shipped` in a wheel (sgpo_async/installation.py), so that
there is one copy of each. An editable installation uses those of the checkout.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = {"configs": (".yaml", ".json"), "examples": (".py", ".ipynb")}


class BuildPy(build_py):
    """Copies the modules and the data of the package."""

    def _get_data_files(self) -> list[tuple[str, str, str, list[str]]]:
        """(package, source folder, target folder, files) for the wheel: those that pyproject.toml names, and ours."""
        return [*super()._get_data_files(), self._shipped()]

    def get_data_files_without_manifest(self) -> list[tuple[str, str, str, list[str]]]:
        """The same for the source distribution."""
        return [*super().get_data_files_without_manifest(), self._shipped()]

    def _shipped(self) -> tuple[str, str, str, list[str]]:
        files = [
            str(file)
            for folder, suffixes in FOLDERS.items()
            for file in sorted(Path(folder).rglob("*"))
            if file.suffix in suffixes
        ]
        return "sgpo_async", "", str(Path(self.build_lib, "sgpo_async", "shipped")), files


setup(cmdclass={"build_py": BuildPy})
