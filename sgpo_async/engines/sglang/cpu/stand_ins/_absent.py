"""Stand-ins for packages that are not installed: their names can be imported, and raise when they are used."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NoReturn


class Absent:
    """A name in a package that is not installed; calling, subscripting or launching it raises."""

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{self.__name__} was called, but SGLang's CPU environment has only a stand-in without code")

    __getitem__ = __call__

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __or__(self, _: Any) -> Any:  # in annotations: `tl.tensor | None`
        return Any

    __ror__ = __or__


class AbsentModule(ModuleType):
    """A module in which every name is Absent."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a submodule of one package under every name."""

    def __init__(self, package: str, names: Mapping[str, Mapping[str, Any]]) -> None:
        self._prefix, self._names = f"{package}.", names

    def find_spec(self, name: str, *_: Any) -> Any:
        if name.startswith(self._prefix):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Set the names that have a value; there is no code to run."""
        module.__dict__.update(self._names.get(module.__name__, {}))


def stand_in(package: str, names: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Make the module `package` stand in for a package that is not installed.

    `names` maps modules to the few names that need a value, because SGLang uses them while it is imported.
    """
    finder = _Finder(package, names or {})
    module = sys.modules[package]
    module.__class__ = AbsentModule
    finder.exec_module(module)
    sys.meta_path.append(finder)
