"""Finding a model's folder and its tokenizer. Free of torch until a tokenizer is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from sgpo_async.errors import DataError

BUILTIN = {"builtin:cues": Path(__file__).parents[1] / "tasks" / "cues_base"}


def model_folder(path: str) -> str:
    """`path` as transformers takes it: the folder of a built-in model, a folder, or a hub name.

    Raises DataError if it names a built-in that does not exist, or looks like a folder and is none.
    """
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise DataError(f"model.path: {path}: no such built-in model; there is {', '.join(BUILTIN)}")
        return str(BUILTIN[path])
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(f"model.path: {path}: holds no config.json; name a Hugging Face model folder")
        return str(folder)
    if looks_local:
        raise DataError(f"model.path: {path}: no such folder")
    return path


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model. Raises DataError, one line, if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=Path(folder).is_dir())
    except (OSError, ValueError) as error:
        raise DataError(f"model.path: {folder}: no tokenizer can be loaded ({str(error).splitlines()[0]})") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes an empty one where the files are missing
        raise DataError(f"model.path: {folder}: the tokenizer has no vocabulary; add its tokenizer.json")
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A short digest of what a token id means: vocabulary, special tokens, chat template.

    Two members whose fingerprints differ would read each other's token ids as other words.
    """
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.all_special_ids, tokenizer.chat_template]
    return xxhash.xxh3_128_hexdigest(json.dumps(content, ensure_ascii=False).encode())[:16]
