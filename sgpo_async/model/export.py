"""Write the trained policy as a Hugging Face folder."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from sgpo_async.errors import CheckpointError
from sgpo_async.files import set_usual_modes

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
TEMPLATES = "additional_chat_templates"  # subfolder with a tokenizer's further chat templates
CONFIG, GENERATION = "config.json", "generation_config.json"
_DTYPE = re.compile(r'("(?:torch_)?dtype"\s*:\s*)"\w+"')


def export(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path, *, source: str) -> None:
    """Write `tensors` as a folder that AutoModelForCausalLM and AutoTokenizer load.

    All files but the weights are those of the source, word for word: transformers would write config.json in a form
    that earlier releases misread (rope_theta), and refuses some generation_config.json that it has read. Only the dtype
    in config.json becomes that of `tensors`. File modes are as the umask says.

    Args:
        model: the model that gives the architecture; its own parameters may be sharded and are not read.
        tensors: whole parameters under the model's parameter names.
        source: the folder that the model came from, or its name on the Hugging Face hub.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    state = model.state_dict()
    buffers = {name: state[name] for name, _ in model.named_buffers() if name in state}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _save_weights(model, {**buffers, **tensors}, folder)
        _copy_files(_folder_of(source), folder, model)
        if (config := folder / CONFIG).exists() and tensors:
            dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
            text = config.read_text(encoding="utf-8")
            config.write_text(_DTYPE.sub(rf'\1"{dtype}"', text), encoding="utf-8")
        set_usual_modes(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: the policy cannot be exported: {error}") from error


def _folder_of(source: str) -> Path:
    """The folder with the files of the source; for a hub name the one in the cache, into which loading has put them."""
    if Path(source).is_dir():
        return Path(source)
    config = cached_file(source, CONFIG, local_files_only=True)
    assert config is not None
    return Path(config).parent


def _save_weights(model: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write weights and config.json."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # transformers refuses to write some that it reads
    try:
        model.save_pretrained(folder, state_dict=dict(tensors))
    finally:
        model.generation_config = own
    (folder / GENERATION).unlink(missing_ok=True)


def _copy_files(source: Path, folder: Path, model: PreTrainedModel) -> None:
    """Copy all files but weights. config.json is left out if it describes another model, of which `model` is a part."""
    for file in (*source.glob("*"), *source.glob(f"{TEMPLATES}/*")):
        if not file.is_file() or file.name.endswith(WEIGHTS):
            continue
        if file.name == CONFIG and json.loads(file.read_bytes()).get("model_type") != model.config.model_type:
            continue
        target = folder / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)  # its content only: the source may be read-only
