"""Resolution of model paths, and fingerprints of tokenizers."""

import json
from pathlib import Path

import pytest

from sgpo_async.errors import DataError
from sgpo_async.model.folder import load_tokenizer, model_folder, tokenizer_fingerprint


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


def test_a_hugging_face_hub_name_is_returned_unchanged() -> None:
    assert model_folder("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B-Instruct"


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
