"""Which models are read in slices, which are loaded whole, and that both ways give the same model or error."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from sgpo_async.config.schema import Algorithm, Learner, Lora, Model, Run
from sgpo_async.errors import DataError
from sgpo_async.learner import loading, policy
from sgpo_async.learner.process_group import join_alone
from sgpo_async.model.folder import model_folder
from sgpo_async.model.load import load_model
from tests.reference import learner_cases as cases

FILE = "model.safetensors"
EMBEDDING, OUTPUT, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cases.tiny_model(tied=True, dtype=torch.float32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **changed: torch.Tensor | None) -> None:
    """Change tensors of the only file; with None, remove them."""
    tensors = load_file(folder / FILE) | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / FILE, {"format": "pt"})


def load(folder: Path | str) -> policy.Policy:
    return loading.load_policy(str(folder), Run(learner=Learner(precision="float32")), join_alone())


def whole(loaded: policy.Policy, folder: Path | str, caplog: pytest.LogCaptureFixture) -> str:
    """Why a model was loaded whole, or "", after a check that its values are those of `load_model`."""
    expected = load_model(str(folder), device="cpu", dtype="float32")
    for own, other in [
        (loaded.model.named_parameters(), expected.named_parameters()),
        (loaded.model.named_buffers(), expected.named_buffers()),
    ]:
        found, wanted = dict(own), dict(other)
        assert list(found) == list(wanted)
        for name, tensor in wanted.items():
            tensor_found = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
            assert torch.equal(tensor_found, tensor), name
    assert loaded.model.generation_config.to_dict() == expected.generation_config.to_dict()
    lines = [record.getMessage() for record in caplog.records if "loads the whole model" in record.getMessage()]
    assert len(lines) <= 1
    return lines[0].rpartition("sharded: ")[2] if lines else ""


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="sgpo_async")


def test_a_model_in_one_file_is_read_in_slices(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}', encoding="utf-8")
    assert whole(load(folder), folder, caplog) == ""


def test_only_the_files_of_the_index_are_read(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({NORM: torch.ones(16)}, folder / "consolidated.safetensors")
    assert whole(load(folder), folder, caplog) == ""


def test_a_tied_matrix_that_is_in_the_files_twice_is_read_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, **{OUTPUT: load_file(folder / FILE)[EMBEDDING].clone()})
    assert whole(load(folder), folder, caplog) == ""


def test_a_tied_matrix_may_have_its_other_name(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, **{OUTPUT: load_file(folder / FILE)[EMBEDDING].clone(), EMBEDDING: None})
    assert whole(load(folder), folder, caplog) == ""


def test_matrices_that_are_tied_but_differ_are_loaded_whole(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, **{OUTPUT: load_file(folder / FILE)[EMBEDDING] + 1})
    loaded = load(folder)
    assert whole(loaded, folder, caplog) == f"config.json ties {EMBEDDING}, {OUTPUT}, which differ"
    assert loaded.head is not loaded.model.get_input_embeddings().weight


def test_tensors_that_the_model_does_not_have_are_ignored(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert whole(load(folder), folder, caplog) == ""


def test_tensors_under_other_names_are_loaded_whole(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / FILE).items()}
    save_file(tensors, folder / FILE, {"format": "pt"})
    assert "instead of model.embed_tokens.weight, lm_head.weight" in whole(load(folder), folder, caplog)


def test_a_model_that_transformers_converts_is_loaded_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    config = MixtralConfig(**size, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    reason = "transformers renames or converts tensors of a MixtralForCausalLM"
    assert whole(load(tmp_path), tmp_path, caplog) == reason


def test_weights_that_are_not_safetensors_are_loaded_whole(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(load_file(folder / FILE), folder / "pytorch_model.bin")
    (folder / FILE).unlink()
    assert whole(load(folder), folder, caplog).startswith("it has neither model.safetensors nor")


def test_buffers_of_learned_positions_are_right(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=11, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert whole(load(tmp_path), tmp_path, caplog) == ""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float64_is_rounded_as_in_a_teacher_that_is_loaded_whole(folder: Path, dtype: str) -> None:
    """Twice, if the teacher is kept in bfloat16: 1 + 2^-8 + 2^-30 becomes 1 + 2^-8 and then 1."""
    edit(folder, **{NORM: torch.full((16,), 1 + 2**-8 + 2**-30, dtype=torch.float64)})
    run = Run(algorithm=Algorithm(teacher="frozen", teacher_dtype=dtype))
    teacher = loading.load_teacher(str(folder), run, join_alone())
    expected = load_model(str(folder), device="cpu", dtype="float32").get_parameter(NORM).to(getattr(torch, dtype))
    found = teacher.model.get_parameter(NORM).full_tensor()
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def broken_file(folder: Path) -> None:
    (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-100])


def no_file(folder: Path) -> None:
    (folder / FILE).unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def unknown_model(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_bytes()) | {"model_type": "no-such-model"}
    (folder / "config.json").write_text(json.dumps(text), encoding="utf-8")


BREAKS: dict[str, Callable[[Path], None]] = {
    "one missing": lambda folder: edit(folder, **{NORM: None}),
    "tied missing": lambda folder: edit(folder, **{EMBEDDING: None, NORM: None}),
    "missing, and others": lambda folder: edit(folder, **{NORM: None, "other": torch.ones(3)}),
    "misshapen": lambda folder: edit(folder, **{NORM: torch.ones(17)}),
    "misshapen rows": lambda folder: edit(folder, **{EMBEDDING: torch.ones(12, 16)}),
    "broken file": broken_file,
    "no file": no_file,
    "broken config": broken_config,
    "unknown model": unknown_model,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("name", BREAKS)
def test_errors_are_those_of_a_model_that_is_loaded_whole(folder: Path, name: str) -> None:
    BREAKS[name](folder)
    with pytest.raises(DataError) as expected:
        load_model(str(folder), device="cpu", dtype="float32")
    with pytest.raises(DataError) as found:
        load(folder)
    assert str(found.value) == str(expected.value)
    assert "\n" not in str(found.value)


def test_a_missing_parameter_is_found_without_loading_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(folder, **{NORM: None})
    monkeypatch.delattr(loading, "load_model")
    with pytest.raises(DataError, match=r"lacks 1 parameters .*\(model\.norm\.weight\)"):
        load(folder)


def test_logits_that_are_not_hidden_times_matrix_are_rejected_after_sharding(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_logits = policy.Policy.own_logits
    monkeypatch.setattr(policy.Policy, "own_logits", lambda self, ids: 2 * own_logits(self, ids))
    with pytest.raises(DataError, match="hidden @ matrix"):
        load(folder)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_check_computes_in_float32_whatever_the_precision(folder: Path, precision: str, monkeypatch) -> None:
    dtypes = []
    own_logits = policy.Policy.own_logits

    def noted(self: policy.Policy, ids: object) -> torch.Tensor:
        logits = own_logits(self, ids)
        dtypes.append(logits.dtype)
        return logits

    monkeypatch.setattr(policy.Policy, "own_logits", noted)
    loading.load_policy(str(folder), Run(learner=Learner(precision=precision)), join_alone())
    assert set(dtypes) == {torch.float32}


@pytest.mark.parametrize(("rank", "dtype"), [(0, torch.float32), (4, torch.bfloat16)])
def test_the_check_needs_no_more_memory_than_the_model_is_kept_in(
    folder: Path, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model of adapters is kept in `model.dtype`; it computes in float32 in the check."""
    stored, computed = [], []
    check = loading.check_model

    def noted(twin: policy.Policy) -> None:
        stored.append({parameter.dtype for parameter in twin.model.parameters()})
        computed.append(twin.own_logits(np.arange(3)).dtype)
        check(twin)

    monkeypatch.setattr(loading, "check_model", noted)
    run = Run(model=Model(dtype="bfloat16"), learner=Learner(precision="float32", lora=Lora(rank=rank)))
    loaded = loading.load_policy(str(folder), run, join_alone())
    assert (stored, computed) == ([{dtype}], [torch.float32])
    expected = dict(load_model(str(folder), device="cpu", dtype="float32").named_parameters())
    for name, parameter in loaded.model.named_parameters():
        if name in expected:
            assert torch.equal(parameter.full_tensor(), expected[name].to(dtype)), name


FROM_HUB = """
from sgpo_async.config.schema import Learner, Run
from sgpo_async.learner import loading
from sgpo_async.learner.process_group import join_alone
del loading.load_model
policy = loading.load_policy("owner/model", Run(learner=Learner(precision="float32")), join_alone())
print(policy.head.full_tensor().double().sum().item())
"""


@pytest.mark.parametrize("shard_size", ["1GB", "100KB"])
def test_a_model_of_the_hugging_face_hub_is_read_in_slices(tmp_path: Path, shard_size: str) -> None:
    """The hub's cache has the layout of huggingface_hub; nothing is downloaded."""
    repository = tmp_path / "hub" / "models--owner--model"
    model = AutoModelForCausalLM.from_pretrained(model_folder("builtin:cues"), dtype=torch.float32)
    model.save_pretrained(repository / "snapshots" / "0123", max_shard_size=shard_size)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", FROM_HUB], capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == model.get_output_embeddings().weight.double().sum().item()
