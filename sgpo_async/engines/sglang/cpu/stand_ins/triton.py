"""Stands in for triton (286 MB): SGLang defines its kernels at import; launching one raises."""

from collections.abc import Callable
from typing import Any

from _absent import Absent, stand_in

__path__: list[str] = []
__version__ = "3.0.0"


def _kernel(function: Any = None, **_: Any) -> Any:
    """`@triton.jit`, with arguments or without: the kernel it makes raises when it is launched."""
    return _kernel if function is None else Absent(f"triton kernel {getattr(function, '__name__', function)}")


def _decorator(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """`@triton.autotune(...)`, `@triton.heuristics(...)`: the kernel below stays what it is."""
    return lambda kernel: kernel


class _Value:
    """`tl.constexpr(value)`, `triton.Config(...)`: only ever given to kernels."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


stand_in(
    __name__,
    {
        "triton": {"jit": _kernel, "autotune": _decorator, "heuristics": _decorator, "Config": _Value},
        "triton.language": {"constexpr": _Value},
        "triton.knobs": {"runtime": None},  # SGLang watches kernels being loaded, where there are any
    },
)
