"""Stand-in for triton (286 MB): SGLang defines its kernels while it is imported; launching one raises."""

from collections.abc import Callable
from typing import Any

from _absent import Absent, stand_in

__path__: list[str] = []
__version__ = "3.0.0"


def _kernel(function: Any = None, **_: Any) -> Any:
    """`@triton.jit`, with or without arguments: the resulting kernel raises when it is launched."""
    return _kernel if function is None else Absent(f"triton kernel {getattr(function, '__name__', function)}")


def _decorator(*_: Any, **__: Any) -> Callable[[Any], Any]:
    """`@triton.autotune(...)`, `@triton.heuristics(...)`: returns the kernel unchanged."""
    return lambda kernel: kernel


class _Value:
    """`tl.constexpr(value)`, `triton.Config(...)`: values that are only passed to kernels."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


stand_in(
    __name__,
    {
        "triton": {"jit": _kernel, "autotune": _decorator, "heuristics": _decorator, "Config": _Value},
        "triton.language": {"constexpr": _Value},
        "triton.knobs": {"runtime": None},  # SGLang would observe the loading of kernels
    },
)
