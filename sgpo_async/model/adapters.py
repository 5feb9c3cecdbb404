"""Low-rank adapters (LoRA, arXiv 2106.09685): add them to a model's weights, and write them in the layout of peft.

The adapters of the weight NAME.weight are the tensors NAME.lora_A.weight [rank, inputs] and NAME.lora_B.weight
[outputs, rank]. They change it to weight + scale B A.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sgpo_async.config.schema import Lora
from sgpo_async.errors import CheckpointError, WeightsError
from sgpo_async.files import set_usual_modes

WEIGHT, DOWN, UP = ".weight", ".lora_A.weight", ".lora_B.weight"


def names(adapted: str) -> tuple[str, str]:
    """The names of A and B of the weight of this name."""
    stem = adapted.removesuffix(WEIGHT)
    return stem + DOWN, stem + UP


def is_adapter(name: str) -> bool:
    """Whether this is the name of a tensor of an adapter."""
    return name.endswith((DOWN, UP))


def merge(tensors: Mapping[str, Tensor], adapters: Mapping[str, Tensor], scale: float) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model with adapters added, one after another; computed in float32, in the dtype of the tensor.

    Both arguments may be the same mapping: adapters among `tensors` are left out, and others among `adapters` ignored.

    Raises WeightsError if an adapter belongs to none of the tensors.
    """
    left = {name for name in adapters if is_adapter(name)}
    for name in tensors:
        if is_adapter(name):
            continue
        tensor, (down, up) = tensors[name], names(name)
        if down in left:
            delta = adapters[up].float() @ adapters[down].float()
            tensor = tensor.float().add(delta, alpha=scale).to(tensor.dtype)
            left -= {down, up}
        yield name, tensor
    if left:
        raise WeightsError(
            f"the model has no weight for the adapter {min(left)}; learner and engine need the same model.path"
        )


def save(adapters: Mapping[str, Tensor], lora: Lora, folder: Path, *, base: str) -> None:
    """Write adapters as a folder that `peft.PeftModel.from_pretrained` loads. Raises CheckpointError.

    Args:
        base: the folder or the name of the model that they were trained on.
    """
    targets = {name.removesuffix(DOWN).rpartition(".")[2] for name in adapters if name.endswith(DOWN)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapters.items()}
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        set_usual_modes(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: the adapter cannot be written: {error}") from error
