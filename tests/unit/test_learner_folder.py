"""Models are loaded and exported; models that cannot be trained on packed sequences are rejected."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from sgpo_async.errors import CheckpointError, DataError
from sgpo_async.learner.attention import Segments
from sgpo_async.learner.policy import Policy, check_model
from sgpo_async.model.export import WEIGHTS, export
from sgpo_async.model.folder import load_tokenizer, model_folder, tokenizer_fingerprint
from sgpo_async.model.load import end_tokens, load_model
from tests.reference import learner_cases as cases


@pytest.mark.parametrize("tied", [False, True])
def test_an_exported_model_loads_with_equal_logits(tmp_path: Path, tied: bool) -> None:
    model = cases.tiny_model(tied=tied, dtype=torch.float32)
    source = tmp_path / "source"
    model.save_pretrained(source)
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    tensors = {name: parameter.detach() + 0.1 for name, parameter in model.named_parameters()}
    export(load_model(str(source), device="cpu", dtype="float32"), tensors, tmp_path / "policy", source=str(source))
    assert (tmp_path / "policy" / "tokenizer.json").read_text(encoding="utf-8") == "{}"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
        ids = torch.arange(cases.VOCABULARY)[None]
        assert torch.equal(loaded(ids).logits, model(ids).logits)


OLD_STYLE = {"torch_dtype": "bfloat16", "transformers_version": "4.45.0", "not_known_to_transformers": [1e-06, "ü"]}
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
LLAMA3 |= {"original_max_position_embeddings": 32}


def written(folder: Path, config: dict, generation: dict | None = None) -> PreTrainedModel:
    """Write a tiny Llama whose config.json has these keys as well, and generation_config.json; return the model."""
    size = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    text = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | size | config, indent=4)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return load_model(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 1e6},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_theta": 1e6, "rope_scaling": None, "dtype": "float32", "torch_dtype": "float32"},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"},
        {"eos_token_id": [1, 2], "temperature": 0.7},
    ],
)
def test_an_exported_config_is_the_source_s_word_for_word_but_for_its_dtype(tmp_path: Path, config: dict) -> None:
    source, policy = tmp_path / "source", tmp_path / "policy"
    model = written(source, OLD_STYLE | config)
    export(model, dict(model.named_parameters()), policy, source=str(source))
    text = (source / "config.json").read_text(encoding="utf-8")
    assert (policy / "config.json").read_text(encoding="utf-8") == text.replace('"bfloat16"', '"float32"')
    again, ids = load_model(str(policy), device="cpu", dtype="float32"), torch.arange(13)[None]
    assert again.config.rope_parameters == model.config.rope_parameters
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": 0.6, "eos_token_id": 3},
        {"do_sample": False, "temperature": 0.6, "top_p": 0.95},
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [3, 4]},
        {"num_beams": 1, "length_penalty": 0.5},
        {"temperature": -1.0},
        {"not_known_to_transformers": [1]},
        None,
    ],
)
def test_an_exported_generation_config_is_the_source_s(tmp_path: Path, generation: dict | None) -> None:
    source, policy = tmp_path / "source", tmp_path / "policy"
    model = written(source, {}, generation)
    before = model.generation_config
    export(model, dict(model.named_parameters()), policy, source=str(source))
    assert model.generation_config is before
    files = [folder / "generation_config.json" for folder in (source, policy)]
    assert [file.read_bytes() if file.exists() else None for file in files][1:] == [
        None if generation is None else files[0].read_bytes()
    ]
    assert end_tokens(load_model(str(policy), device="cpu", dtype="float32")) == end_tokens(model)


def test_the_config_of_a_model_that_was_only_a_part_is_not_copied(tmp_path: Path) -> None:
    model = written(tmp_path / "source", {})
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    export(model, dict(model.named_parameters()), tmp_path / "policy", source=str(tmp_path / "source"))
    assert json.loads((tmp_path / "policy" / "config.json").read_bytes())["model_type"] == "llama"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_exported_files_have_the_mode_that_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    model = written(tmp_path / "source", {})
    (tmp_path / "source" / "config.json").chmod(0o400)
    before = os.umask(umask)
    try:
        for _ in range(2):  # again over its own files
            export(model, dict(model.named_parameters()), tmp_path / "policy", source=str(tmp_path / "source"))
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "policy").rglob("*") if file.is_file()]
    assert {file.name for file in files} == {"config.json", "model.safetensors"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {mode}


def test_chat_templates_in_files_of_their_own_survive_but_weights_of_the_source_do_not(tmp_path: Path) -> None:
    source, policy = tmp_path / "source", tmp_path / "policy"
    shutil.copytree(model_folder("builtin:cues"), source)
    (source / "additional_chat_templates").mkdir()
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}", encoding="utf-8")
    for name in ("pytorch_model.bin", "tf_model.h5", "model.safetensors.index.json"):
        (source / name).write_text("{}", encoding="utf-8")
    before = load_tokenizer(str(source))
    model = load_model(model_folder("builtin:cues"), device="cpu", dtype="float32")
    export(model, dict(model.named_parameters()), policy, source=str(source))
    after = load_tokenizer(str(policy))
    assert after.chat_template == before.chat_template != None  # noqa: E711
    assert tokenizer_fingerprint(after) == tokenizer_fingerprint(before)
    assert [file.name for file in policy.iterdir() if file.name.endswith(WEIGHTS)] == ["model.safetensors"]


EXPORT_FROM_HUB = """
import sys
from pathlib import Path
from sgpo_async.model.export import export
from sgpo_async.model.folder import load_tokenizer, tokenizer_fingerprint
from sgpo_async.model.load import end_tokens, load_model
model = load_model("owner/model", device="cpu", dtype="float32")
export(model, dict(model.named_parameters()), Path(sys.argv[1]), source="owner/model")
print(tokenizer_fingerprint(load_tokenizer("owner/model")))
"""


def test_a_model_of_the_hugging_face_hub_is_exported_with_its_files(tmp_path: Path) -> None:
    """The hub's cache has the layout of huggingface_hub; nothing is downloaded."""
    repository = tmp_path / "hub" / "models--owner--model"
    snapshot = repository / "snapshots" / "0123"
    shutil.copytree(model_folder("builtin:cues"), snapshot)
    (snapshot / "chat_template.jinja").write_text("{{ messages[0].content }}!", encoding="utf-8")
    (snapshot / "generation_config.json").write_text('{"temperature": 0.6}', encoding="utf-8")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", EXPORT_FROM_HUB, str(tmp_path / "policy")], capture_output=True, text=True,
        timeout=240, check=False, env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    policy = str(tmp_path / "policy")
    assert done.stdout.split() == [tokenizer_fingerprint(load_tokenizer(policy))]
    assert load_tokenizer(policy).chat_template == "{{ messages[0].content }}!"
    assert (tmp_path / "policy" / "generation_config.json").read_text() == '{"temperature": 0.6}'
    ids = torch.arange(5)[None]
    with torch.no_grad():
        model = load_model(model_folder("builtin:cues"), device="cpu", dtype="float32")
        assert torch.equal(AutoModelForCausalLM.from_pretrained(policy)(ids).logits, model(ids).logits)


def test_the_error_for_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model\.path: .* has no config\.json") as caught:
        load_model(str(tmp_path), device="cpu", dtype="float32")
    assert "\n" not in str(caught.value)


def test_export_to_a_path_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "policy").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be exported"):
        export(cases.tiny_model(), {}, tmp_path / "policy", source="")


@pytest.mark.parametrize("tied", [False, True])
def test_check_accepts_a_model_that_can_be_packed(tied: bool) -> None:
    check_model(Policy(cases.tiny_model(tied=tied)))


def test_check_accepts_a_model_with_learned_positions() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    check_model(Policy(GPT2LMHeadModel(config)))


def test_check_rejects_attention_across_packed_sequences() -> None:
    policy = Policy(cases.tiny_model())
    backbone = policy.model.base_model
    forward = backbone.forward

    def leaking(segments: Segments | None = None, **inputs: torch.Tensor) -> object:
        if segments:
            width = sum(segments.lengths)
            segments = Segments([width], torch.tensor([0, width]), set())
        return forward(**inputs, segments=segments)

    backbone.forward = leaking
    with pytest.raises(DataError, match="its log-probabilities change when sequences are packed"):
        check_model(policy)


def test_check_rejects_logits_that_are_not_hidden_times_matrix() -> None:
    policy = Policy(cases.tiny_model())
    policy.model.lm_head.bias = torch.nn.Parameter(torch.arange(13.0).double())
    with pytest.raises(DataError, match="hidden @ matrix"):
        check_model(policy)
