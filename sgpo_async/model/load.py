"""Load a causal language model from a folder or by hub name, with errors that say what is wrong and where."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from sgpo_async.errors import DataError, EngineError
from sgpo_async.model.folder import BOUNDS


def load_model(path: str, *, device: str, dtype: str) -> PreTrainedModel:
    """Load the model at `path`, a Hugging Face folder or else a name on the Hugging Face hub, in eval mode.

    `device` is auto, cpu or cuda; `dtype` is float32 or bfloat16. A folder is loaded without network access.
    Raises DataError if the model is missing, broken or incomplete, EngineError if the device does not exist.
    """
    target = _device(device)
    local = _is_folder(path)
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), local_files_only=local, output_loading_info=True
        )
    except Exception as error:  # many libraries can fail here, each with its own exception types
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"model.path: cannot load a causal language model from {path!r} ({type(error).__name__}: {reason}); "
            + ("restore the folder or export it again" if local else "name an existing folder or a model on the hub")
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise DataError(
            f"model.path: {path!r} lacks {len(missing)} parameters that its config.json requires "
            f"({', '.join(missing[:3])}); restore the folder or export it again"
        )
    return model.to(target).eval()


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return the ids of the tokens that end a completion, from the model's generation config or else its config."""
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def longest(model: PreTrainedModel) -> int:
    """Return the length in tokens of the longest sequence for which the engine's plain causal mask is correct.

    Up to the window's length, a layer with a sliding window attends to exactly the same tokens as full attention.
    """
    config = model.config.get_text_config()
    bounds = [getattr(config, name, None) for name in BOUNDS]
    return min((bound for bound in bounds if bound), default=2**31)


def _is_folder(path: str) -> bool:
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise DataError(f"model.path: {path!r} has no config.json; name the folder of a Hugging Face model")
        return True
    if not path or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise DataError(f"model.path: no such folder {path!r}; name the folder of a Hugging Face model")
    return False


def device_of(name: str) -> Literal["cpu", "cuda"]:
    """Resolve `engine.device` to cpu or cuda, without checking that this machine has the device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if name == "cuda" else "cpu"


def _device(name: str) -> torch.device:
    if name == "auto":
        name = device_of(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError("engine.device: this machine has no usable CUDA device; set engine.device=cpu")
    return torch.device(name)
