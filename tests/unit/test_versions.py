"""The versions in pyproject.toml, requirements.lock and the Makefile agree, and suit every supported Python."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
RANGES = {
    canonicalize_name(requirement.name): requirement.specifier
    for requirement in map(Requirement, DECLARED)
    if canonicalize_name(requirement.name) != PROJECT["name"]  # an extra that includes another extra
}

CHOSEN_BY_TORCH = {"triton"}  # a CUDA build of torch requires its own exact version


def _locked() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]  # any other form raises ValueError
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def _torch() -> Version:
    """The torch version that the Makefile installs by default."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(r"^TORCH_INSTALL \?= torch==(\S+)$", makefile, re.MULTILINE)
    assert found
    return Version(found[1])


@pytest.mark.parametrize("name", sorted(RANGES.keys() - CHOSEN_BY_TORCH))
def test_make_setup_installs_a_version_in_the_declared_range(name: str) -> None:
    installed = _locked() | {"torch": _torch()}
    assert name in installed, f"{name} is not in requirements.lock: install it into .venv, then make lock"
    assert installed[name] in RANGES[name], f"{name}: {installed[name]} is not in {RANGES[name]}"


@pytest.mark.parametrize("name", sorted(RANGES))
def test_a_range_has_a_lower_and_an_upper_bound(name: str) -> None:
    assert {specifier.operator for specifier in RANGES[name]} >= {">=", "<"}


def test_the_lock_file_lists_neither_torch_nor_the_packages_of_its_cuda_build() -> None:
    assert not [name for name in _locked() if re.match("torch$|triton$|nvidia-|cuda-|sgpo-", name)]


def test_the_first_release_of_each_supported_python_can_install_the_lock_file() -> None:
    # Debian 12 has Python 3.11.2, and pymdown-extensions 13 needs 3.11.5.
    supported = SpecifierSet(PROJECT["requires-python"])
    pythons = [python for minor in range(30) if (python := Version(f"3.{minor}.0")) in supported]
    assert pythons
    refused = []
    for name, version in _locked().items():
        try:
            installed = metadata(name)
        except PackageNotFoundError:
            continue  # this environment has fewer extras
        # Not every package names a range, and what a missing key gives depends on who reads: importlib_metadata raises.
        if Version(installed["Version"]) == version and "Requires-Python" in installed:
            needed = installed["Requires-Python"]
            refused += [f"{name}=={version} needs Python {needed}" for p in pythons if p not in SpecifierSet(needed)]
    assert not refused
