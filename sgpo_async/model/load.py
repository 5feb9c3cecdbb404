"""Load a causal language model from a folder or by hub name, with errors that say what is wrong and where."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from sgpo_async.errors import DataError, EngineError
from sgpo_async.model.folder import BOUNDS, is_folder, load_tokenizer


def load_model(path: str, *, device: str, dtype: str) -> PreTrainedModel:
    """Load the model at `path`, a Hugging Face folder or else a name on the Hugging Face hub, in eval mode.

    `device` is auto, cpu or cuda; `dtype` is float32 or bfloat16. A folder is loaded without network access.
    Raises DataError if the model is missing, broken or incomplete, EngineError if the device does not exist.
    """
    target = _device(device)
    local = is_folder(path)
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
    if info["missing_keys"]:
        raise lacks(path, info["missing_keys"])
    return model.to(target).eval()


def lacks(path: str, missing: Collection[str]) -> DataError:
    """The error of a model whose files lack these parameters."""
    return DataError(
        f"model.path: {path!r} lacks {len(missing)} parameters that its config.json requires "
        f"({', '.join(sorted(missing)[:3])}); restore the folder or export it again"
    )


def end_tokens(model: PreTrainedModel, tokenizer: Any = None) -> frozenset[int]:
    """Return the ids of the tokens that end a completion: those of the model, and the end token of the tokenizer.

    The model's are those of its generation config, or else of its config. SFT appends the tokenizer's to every
    response, so a model that was trained by it may use no other.
    """
    ends: set[int] = set()
    for config in (model.generation_config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            ends.update([ids] if isinstance(ids, int) else ids)
            break
    own = getattr(tokenizer, "eos_token_id", None)
    return frozenset(ends if own is None else {*ends, own})


def end_token_warning(model: PreTrainedModel, tokenizer: Any) -> str:
    """What the user should know if the model's end tokens do not include the tokenizer's; else an empty text."""
    ends = end_tokens(model)
    if not ends or tokenizer.eos_token_id is None or tokenizer.eos_token_id in ends:
        return ""
    others = ", ".join(f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in sorted(ends))
    return (
        f"the tokenizer ends with {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), the model's generation config "
        f"with {others}: each of them ends a completion here, and SFT trains the tokenizer's"
    )


def tokenizer_of(path: str) -> Any:
    """Return the tokenizer at `path`, or None if there is none that can be loaded; whoever needs one reports that."""
    try:
        return load_tokenizer(path)
    except DataError:
        return None


def read_config(path: str) -> PreTrainedConfig:
    """Read the config.json of the model at `path`. Raises DataError if that is not possible."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=is_folder(path))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"model.path: cannot read the config.json of {path!r} ({reason}); restore it") from None
    return config


def on_meta_device(config: PreTrainedConfig, dtype: str = "float32") -> PreTrainedModel:
    """The modules of a model, with parameters that have names, shapes and a dtype, but no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return model


def positions(path: str) -> int:
    """Return the number of positions of the model at `path`. Raises DataError if its config.json cannot be read."""
    return _positions(read_config(path))


def _positions(config: Any, *more: str) -> int:
    text = config.get_text_config()
    bounds = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions", *more)]
    return min((bound for bound in bounds if bound), default=2**31)


def longest(model: PreTrainedModel) -> int:
    """Return the length in tokens of the longest sequence for which the engine's plain causal mask is correct.

    Up to the window's length, a layer with a sliding window attends to exactly the same tokens as full attention.
    """
    return _positions(model.config, *BOUNDS[2:])


def cache_bytes(config: PreTrainedConfig, *, dtype: torch.dtype, tp: int = 1) -> int:
    """Return the bytes of the keys and values of one token in a cache that holds one of `tp` parts of the heads."""
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    return int(2 * text.num_hidden_layers * max(kv_heads // tp, 1) * head * dtype.itemsize)


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
