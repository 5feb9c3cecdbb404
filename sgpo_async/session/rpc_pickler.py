"""What Torch RPC may unpickle: messages authenticated with the session's secret, of a few known functions and classes.

    rpc_async ─▶ serialize ─▶ tag + pickle ── Torch RPC ──▶ deserialize ─▶ right tag? ─▶ allowed globals? ─▶ the call
                 (tensors travel beside the pickle)                        no: refused, nothing is unpickled

Torch RPC unpickles all that arrives at its port, so without this everyone who reaches the port runs code here. All its
Python messages (calls, results, exceptions) pass through one object, `_internal_rpc_pickler` in torch's
distributed/rpc/internal.py, whose two methods `install` replaces. This is no public interface: `install` and
`check_used` raise SessionError if a torch does not go through it. Run with torch 2.13.

Torch RPC's calls of builtin operators and TorchScript functions never reach Python, and so not this module: see
docs/security.md.
"""

from __future__ import annotations

import builtins
import importlib
import io
import logging
import pickle
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.distributed import distributed_c10d
from torch.distributed.rpc import api, internal

from sgpo_async import errors
from sgpo_async.errors import SessionError
from sgpo_async.session.secret import authenticate, verify

log = logging.getLogger(__name__)

_PURPOSE = b"rpc"
_TORCH = {  # of torch itself: its calls and results, and the handshake of `init_rpc`
    "torch.distributed.rpc.internal": {"PythonUDF", "RemoteException"},
    "torch.distributed.rpc.api": {"_gather_to_leader", "_broadcast_to_followers"},
}


class SessionPickler:
    """`serialize` and `deserialize` of Torch RPC for one session."""

    def __init__(self, secret: bytes, allowed: Collection[Callable[..., Any]]) -> None:
        """`allowed` are the functions and classes of this package that may arrive."""
        self._secret = secret
        self._allowed = {(item.__module__, item.__qualname__) for item in allowed}
        self._allowed |= {(module, name) for module, names in _TORCH.items() for name in names}
        self.opened = 0  # messages that were accepted
        self.refused = 0

    def serialize(self, value: Any) -> tuple[bytes, list[torch.Tensor]]:
        """The pickle of `value` with its authentication tag, and the tensors in it."""
        if isinstance(value, internal.RemoteException) and not _is_known_error(value.exception_type):
            value = value._replace(exception_type=RuntimeError)  # its message names the type
        file = io.BytesIO()
        pickler = _Pickler(file)
        pickler.dump(value)
        return authenticate(self._secret, _PURPOSE, file.getvalue()), pickler.tensors

    def deserialize(self, message: bytes, tensors: list[torch.Tensor]) -> Any:
        """The value. Raises RuntimeError if the message is not of this session, or has a global that is not allowed."""
        try:
            data = verify(self._secret, _PURPOSE, message)
            value = _Unpickler(data, tensors, self._allowed).load()
        except Exception as error:  # Forged; and a damaged pickle raises almost anything
            self.refused += 1
            if self.refused == 1:  # once: a stranger could fill the disk
                log.warning("refused a message that reached the port of Torch RPC: %s", error)
            raise RuntimeError(f"refused: {error}") from None
        self.opened += 1
        return value

    def install(self) -> None:
        """Let Torch RPC use this object in this process. Raises SessionError if this torch would not use it."""
        hook = getattr(internal, "_internal_rpc_pickler", None)
        of_calls = getattr(api, "_default_pickler", None)
        if hook is None or of_calls is not hook or not hasattr(distributed_c10d, "_unpickler"):
            raise SessionError(_unfit())
        vars(hook).update(serialize=self.serialize, deserialize=self.deserialize)
        # The handshake of `init_rpc` also exchanges names and devices by `all_gather_object`.
        distributed_c10d._unpickler = _PlainUnpickler
        message, _ = internal.serialize(None)
        internal.deserialize(message, [])
        self.check_used()
        self.opened = 0

    def check_used(self) -> None:
        """Raise SessionError if the handshake of `init_rpc` has not passed through this object."""
        if not self.opened:
            raise SessionError(_unfit())


def load_job(data: bytes, allowed: Collection[str]) -> Any:
    """Unpickle a job: the functions named MODULE:NAME in `allowed`, torch's dtypes, and plain values.

    Raises SessionError if it has any other global.
    """
    try:
        return _JobUnpickler(data, allowed).load()
    except pickle.UnpicklingError as error:
        raise SessionError(f"compute: {error}; the weight sender computes only {', '.join(allowed)}") from None


def _unfit() -> str:
    return (
        f"Torch RPC of torch {torch.__version__} does not pickle through torch.distributed.rpc.internal."
        "_internal_rpc_pickler, so its messages cannot be checked; use torch 2.13"
    )


def _is_known_error(kind: type[BaseException]) -> bool:
    """Whether an exception may travel as its class: those of Python and of `sgpo_async.errors`."""
    return getattr({"builtins": builtins, errors.__name__: errors}.get(kind.__module__), kind.__name__, None) is kind


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=4)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        """Tensors travel beside the pickle, which has their positions."""
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles numbers, texts, lists, tuples, sets and dictionaries, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module[:100]}.{name[:100]} is not allowed in a message")


class _Unpickler(_PlainUnpickler):
    def __init__(self, data: bytes, tensors: list[torch.Tensor], allowed: Collection[tuple[str, str]]) -> None:
        super().__init__(io.BytesIO(data))
        self._tensors, self._allowed = tensors, allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._allowed:
            return getattr(importlib.import_module(module), name)
        source = {"builtins": builtins, errors.__name__: errors}.get(module)
        kind = getattr(source, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return kind
        return super().find_class(module, name)

    def persistent_load(self, position: Any) -> torch.Tensor:
        if not isinstance(position, int) or not 0 <= position < len(self._tensors):
            raise pickle.UnpicklingError("a tensor of the message is missing")
        return self._tensors[position]


class _JobUnpickler(_PlainUnpickler):
    def __init__(self, data: bytes, allowed: Collection[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}:{name}" in self._allowed:
            return getattr(importlib.import_module(module), name)
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else super().find_class(module, name)
