"""Resolution of model paths, the size of the weights there, and fingerprints of tokenizers."""

import json
from pathlib import Path
from typing import Literal

import huggingface_hub.constants
import numpy as np
import pytest
from safetensors.numpy import save_file

from sgpo_async.config import Run
from sgpo_async.config.schema import Model
from sgpo_async.engines.sglang.weight_sync.model_facts import model_facts
from sgpo_async.errors import DataError
from sgpo_async.model.folder import (
    load_tokenizer,
    model_folder,
    stored_parameters,
    tokenizer_fingerprint,
    version_bytes,
)
from sgpo_async.model.load import load_model, read_config
from sgpo_async.model.slices import open_slices
from sgpo_async.weights import digest


def test_the_shipped_policy_is_found_and_has_a_tokenizer() -> None:
    tokenizer = load_tokenizer(model_folder("builtin:cues"))
    assert tokenizer.eos_token_id is not None


@pytest.mark.parametrize(
    ("path", "part"),
    [("builtin:nothing", "builtin:cues"), ("./absent", "no such folder"), ("/absent/model", "no such folder")],
)
def test_the_error_for_a_missing_model_names_its_path(path: str, part: str) -> None:
    with pytest.raises(DataError) as caught:
        model_folder(path)
    assert path in str(caught.value)
    assert part in str(caught.value)


def test_the_error_for_a_folder_without_a_model_names_config_json(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="config.json"):
        model_folder(str(tmp_path))


def test_every_reader_of_a_model_names_a_wrong_path_in_the_same_words(tmp_path: Path) -> None:
    def facts(path: str) -> object:
        return model_facts(path, dtype="float32", tp=1, device="cpu", digest=digest)

    for path in (str(tmp_path), str(tmp_path / "absent")):
        with pytest.raises(DataError) as expected:
            model_folder(path)
        for read in (read_config, facts, open_slices, lambda path: load_model(path, device="cpu", dtype="float32")):
            with pytest.raises(DataError) as caught:
                read(path)
            assert str(caught.value) == str(expected.value)


def test_a_folder_in_the_home_folder_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_weights(tmp_path / "model", sharded=False)
    assert model_folder("~/model") == str(tmp_path / "model")


def test_a_hugging_face_hub_name_is_returned_unchanged() -> None:
    assert model_folder("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B-Instruct"


def write_weights(folder: Path, *, sharded: bool) -> None:
    """A model of 2 x 8 parameters in float16, and the same ones once more in a file that transformers does not read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    tensors = {name: np.zeros((2, 4), np.float16) for name in ("a", "b")}
    save_file(tensors, folder / "consolidated.safetensors")
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return
    files = {name: f"model-{name}.safetensors" for name in tensors}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("dtype", "nbytes"), [("float32", 64), ("bfloat16", 32)])
def test_the_size_of_a_version_is_that_of_the_parameters_in_model_dtype(
    tmp_path: Path, sharded: bool, dtype: Literal["float32", "bfloat16"], nbytes: int
) -> None:
    write_weights(tmp_path, sharded=sharded)
    assert version_bytes(Run(model=Model(path=str(tmp_path), dtype=dtype))) == nbytes


def test_the_size_of_a_model_on_the_hub_is_that_of_its_copy_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert stored_parameters("owner/name") == 0
    cached = tmp_path / "models--owner--name"
    write_weights(cached / "snapshots" / "1234", sharded=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1234")
    assert stored_parameters("owner/name") == 16


def test_weights_that_cannot_be_read_have_no_size(tmp_path: Path) -> None:
    write_weights(tmp_path, sharded=True)
    (tmp_path / "model-a.safetensors").write_bytes(b"not weights")
    (tmp_path / "model-b.safetensors").unlink()
    assert stored_parameters(str(tmp_path)) == 0, "loading the model names the file"
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert stored_parameters(str(tmp_path)) == 0


def test_the_error_for_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_the_fingerprint_changes_when_a_token_is_added() -> None:
    tokenizer = load_tokenizer(model_folder("builtin:cues"))
    first = tokenizer_fingerprint(tokenizer)
    assert first == tokenizer_fingerprint(load_tokenizer(model_folder("builtin:cues")))
    tokenizer.add_tokens(["another"])
    assert tokenizer_fingerprint(tokenizer) != first
