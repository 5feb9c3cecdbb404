"""Find a model's folder and its tokenizer. torch is imported only when a tokenizer is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from sgpo_async.errors import DataError

BUILTIN = {"builtin:cues": Path(__file__).parents[1] / "tasks" / "cues_base"}


def model_folder(path: str) -> str:
    """Resolve `path` to a value that transformers accepts: the folder of a built-in model, a folder, or a hub name.

    Raises DataError if `path` names a built-in model that does not exist, or looks like a folder that does not exist.
    """
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise DataError(f"model.path: {path}: no such built-in model; the built-in models are {', '.join(BUILTIN)}")
        return str(BUILTIN[path])
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(f"model.path: {path}: the folder has no config.json; name a Hugging Face model folder")
        return str(folder)
    if looks_local:
        raise DataError(f"model.path: {path}: no such folder; name an existing folder or a model on the hub")
    return path


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


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Compute a short digest of the vocabulary, the special tokens and the chat template.

    Two processes whose fingerprints differ would interpret each other's token ids as different text.
    """
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.all_special_ids, tokenizer.chat_template]
    return xxhash.xxh3_128_hexdigest(json.dumps(content, ensure_ascii=False).encode())[:16]
