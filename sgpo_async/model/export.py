"""Write the trained policy as a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from sgpo_async.errors import CheckpointError
from sgpo_async.model.folder import load_tokenizer

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")


def export(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path, *, source: str) -> None:
    """Write `tensors` as a folder that AutoModelForCausalLM and AutoTokenizer load.

    Args:
        model: the model that gives the architecture; its own parameters may be sharded and are not read.
        tensors: whole parameters under the model's parameter names.
        source: the folder that the model came from, whose other files are copied; or a hub name, whose tokenizer
            is saved.

    Raises:
        CheckpointError: the folder cannot be written.
        DataError: the tokenizer of a hub name can no longer be loaded; the weights have been written by then.
    """
    state = model.state_dict()
    buffers = {name: state[name] for name, _ in model.named_buffers() if name in state}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in Path(source).glob("*") if Path(source).is_dir() else ():
            if file.is_file() and not file.name.endswith(WEIGHTS):
                shutil.copy(file, folder)
        model.save_pretrained(folder, state_dict={**buffers, **tensors})
        if not Path(source).is_dir():
            load_tokenizer(source).save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the policy cannot be exported: {error}") from error
