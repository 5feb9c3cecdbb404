"""Find a model's folder and its tokenizer. torch is imported only when a tokenizer is loaded."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open

from sgpo_async.config import Run
from sgpo_async.errors import DataError

BOUNDS = ("max_position_embeddings", "n_positions", "sliding_window", "attention_chunk_size")
"""Keys of a model's config.json that may bound the length of a sequence; see `model.load.longest`."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The file of a model's weights, or the list of the files over which they are spread. transformers reads the first."""

ITEM_BYTES = {"float32": 4, "bfloat16": 2}  # of the values of model.dtype

BUILTIN = {"builtin:cues": Path(__file__).parents[1] / "tasks" / "cues_base"}


def model_folder(path: str) -> str:
    """Resolve `path` to a value that transformers accepts: the folder of a built-in model, a folder, or a hub name.

    Raises DataError if `path` names a built-in model that does not exist, or looks like a folder that does not exist.
    """
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise DataError(f"model.path: {path}: no such built-in model; the built-in models are {', '.join(BUILTIN)}")
        return str(BUILTIN[path])
    if path.startswith("~"):
        path = str(Path(path).expanduser())
    return str(Path(path)) if is_folder(path) else path


def is_folder(path: str) -> bool:
    """Whether `path` is a folder, not a name on the hub. Raises DataError if it is the path of no model folder."""
    if path and Path(path).is_dir():
        if not Path(path, "config.json").is_file():
            raise DataError(f"model.path: {path}: the folder has no config.json; name a Hugging Face model folder")
        return True
    if not path or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise DataError(f"model.path: {path}: no such folder; name an existing folder or a model on the hub")
    return False


def version_bytes(run: Run) -> int:
    """Size in bytes of what the learner publishes; 0 if it is small (adapters), or if the model is not on this disk."""
    return 0 if run.learner.lora.rank else stored_parameters(run.model.path) * ITEM_BYTES[run.model.dtype]


def stored_parameters(path: str) -> int:
    """How many parameters the model at `path` has in its safetensors files; 0 if they are not on this disk."""
    total = 0
    for file in _weight_files(_folder_here(path)):
        # Loading the model names what is wrong with a file.
        with contextlib.suppress(SafetensorError, OSError), safe_open(file, framework="numpy") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _folder_here(path: str) -> Path:
    """The folder of the model at `path`; for a name on the hub the one in the cache, if it is there."""
    folder = Path(model_folder(path))
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache  # takes a while, and only names on the hub need it

        with contextlib.suppress(ValueError):  # no such name is possible; loading the model says so
            if isinstance(config := try_to_load_from_cache(path, "config.json"), str):
                return Path(config).parent
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """The files from which transformers loads the weights in `folder`; others there may hold the same ones again."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no safetensors, or loading names the file
        return []


def load_tokenizer(folder: str) -> Any:
    """Load the tokenizer of a model. Raises DataError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=Path(folder).is_dir())
    except (OSError, ValueError) as error:
        raise DataError(f"model.path: {folder}: cannot load the tokenizer ({str(error).splitlines()[0]})") from None
    # If the files are missing, transformers returns a tokenizer without a vocabulary.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise DataError(f"model.path: {folder}: the tokenizer has no vocabulary; add its tokenizer.json")
    return tokenizer


class PlainTokenizer:
    """The tokens of plain text, as the tokenizer of `load_tokenizer` gives them, without the seconds of its import."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self.name_or_path = str(file.parent)
        self._tokenizer = Tokenizer.from_file(str(file))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def plain_tokenizer(folder: str) -> PlainTokenizer | None:
    """The tokenizer in `folder` for plain text, or None if only `load_tokenizer` can load it."""
    file = Path(folder, "tokenizer.json")
    try:
        return PlainTokenizer(file) if file.is_file() else None
    except Exception:  # the library raises no narrower type; `load_tokenizer` names what is wrong
        return None


def longest_sequence(folder: str) -> int | None:
    """The length in tokens of the longest sequence of a model, from its config.json; None if that does not say."""
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        windowed = config.get("use_sliding_window", True)
        values = [config.get(name) for name in BOUNDS if windowed or name != "sliding_window"]
    except (OSError, ValueError, AttributeError):  # loading the model names what is wrong
        return None
    return min((value for value in values if value), default=None)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Compute a short digest of the vocabulary, the special tokens and the chat template.

    Two processes whose fingerprints differ would interpret each other's token ids as different text.
    """
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.all_special_ids, tokenizer.chat_template]
    return xxhash.xxh3_128_hexdigest(json.dumps(content, ensure_ascii=False).encode())[:16]
