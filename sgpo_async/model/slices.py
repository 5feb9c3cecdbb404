"""Read a model in slices: its modules without weights, and for each parameter a slice of a safetensors file.

transformers loads whole tensors. A rank of the learner keeps 1/ranks of each, so it reads only these rows. The files
are mapped into memory: a slice that is not copied takes no memory of its own.

A model can be read in slices if its parameters are in safetensors files under the model's own names and in its own
shapes. For some architectures transformers renames or converts tensors while it loads them; those are not read here.

torch's `HuggingFaceStorageReader` is not used, because it reads every safetensors file of a folder, whatever the index
says, and cannot say which parameters are missing before a collective fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from sgpo_async.errors import DataError
from sgpo_async.model.folder import is_folder
from sgpo_async.model.load import lacks

ADAPTER = "adapter_config.json"


class Slice(Protocol):
    """A tensor in a safetensors file; `slice[first:last]` are some of its rows, as a view of the mapped file."""

    def __getitem__(self, rows: slice) -> Tensor: ...

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor."""
        ...


@dataclass(frozen=True)
class Slices:
    """A model to be read in slices.

    Attributes:
        model: in eval mode; its parameters are on the meta device, its buffers have their values, on the CPU.
        parameters: each parameter in its file, by its name in `model.named_parameters()`.
    """

    model: PreTrainedModel
    parameters: Mapping[str, Slice]


class CannotSliceError(Exception):
    """Why a model must be loaded whole."""


def open_slices(path: str) -> Slices:
    """Open the model at `path`, a Hugging Face folder or else a name on the Hugging Face hub, in float32.

    Raises:
        DataError: parameters are missing.
        CannotSliceError: only `load_model` can load the model, or say what is wrong with it.
    """
    try:
        return _open(path, local=is_folder(path))
    except (DataError, CannotSliceError):
        raise
    except Exception as error:  # many libraries can fail here, each with its own exception types
        raise CannotSliceError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _open(path: str, *, local: bool) -> Slices:
    config = AutoConfig.from_pretrained(path, local_files_only=local)
    special = (getattr(config, "quantization_config", None), getattr(config, "transformers_weights", None))
    if any(special) or _file(path, ADAPTER, local=local):
        raise CannotSliceError("its weights are quantised, an adapter's, or in files of other names")
    tensors = {name: part for file in _weight_files(path, local=local) for name, part in _slices_of(file)}
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if get_model_conversion_mapping(model, add_legacy=False):
        raise CannotSliceError(f"transformers renames or converts tensors of a {type(model).__name__}")
    parameters = _find(path, model, tensors)
    for name, buffer in model.named_buffers():
        if name in parameters:
            buffer.copy_(parameters.pop(name)[:])
    with suppress(OSError):  # without a file of its own, the one that was made from config.json remains
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=local)
    return Slices(model, parameters)


def _file(path: str, name: str, *, local: bool) -> str | None:
    try:
        return cached_file(path, name, local_files_only=local)
    except OSError:
        return None


def _weight_files(path: str, *, local: bool) -> list[str]:
    if file := _file(path, SAFE_WEIGHTS_NAME, local=local):
        return [file]
    if index := _file(path, SAFE_WEIGHTS_INDEX_NAME, local=local):
        return list(get_checkpoint_shard_files(path, index, local_files_only=local)[0])
    raise CannotSliceError(f"it has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}")


def _slices_of(file: str) -> Iterator[tuple[str, Slice]]:
    """Yield the tensors of a file, which stays mapped as long as one of them exists."""
    opened = safe_open(file, framework="pt")
    for name in opened.keys():  # noqa: SIM118 - it is not a mapping
        yield name, opened.get_slice(name)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Keep only shape and dtype of every parameter that a module registers.

    Buffers get their values: many are computed by the modules and are in no file.
    """

    def on_meta(_: nn.Module, __: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:  # tied parameters remain one object
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()


def _find(path: str, model: PreTrainedModel, tensors: Mapping[str, Slice]) -> dict[str, Slice]:
    """Find each parameter and each saved buffer in the files, by its first name in `model`.

    A tied parameter may have any of its names in the files.
    """
    state = model.state_dict(keep_vars=True)  # a tied parameter once for each of its names
    names: dict[Tensor, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(tensor, []).append(name)
    found = {tensor: [name for name in own if name in tensors] for tensor, own in names.items()}
    if missing := [name for tensor, own in names.items() if not found[tensor] for name in own]:
        others = sorted(tensors.keys() - state.keys())
        if others or model._keys_to_ignore_on_load_missing:
            raise CannotSliceError(f"its files have {_some(others) or 'nothing'} instead of {_some(missing)}")
        raise lacks(path, missing)
    for tensor, own in found.items():
        if changed := [name for name in own if list(tensor.shape) != tensors[name].get_shape()]:
            raise CannotSliceError(f"{_some(changed)} has another shape than config.json says")
        if not all(torch.equal(tensors[own[0]][:], tensors[name][:]) for name in own[1:]):
            raise CannotSliceError(f"config.json ties {_some(own)}, which differ")
    return {own[0]: tensors[found[tensor][0]] for tensor, own in names.items()}


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")
