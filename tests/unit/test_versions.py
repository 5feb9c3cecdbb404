"""The ranges in pyproject.toml, the versions in requirements.lock and the torch version in the Makefile agree."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
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
