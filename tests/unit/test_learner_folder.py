"""Models are loaded and exported; models that cannot be trained on packed sequences are rejected."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sgpo_async.errors import CheckpointError, DataError
from sgpo_async.learner.policy import Policy, check_model
from sgpo_async.model.export import export
from sgpo_async.model.folder import load_tokenizer, model_folder, tokenizer_fingerprint
from sgpo_async.model.load import load_model
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


def test_a_hugging_face_hub_model_is_exported_with_its_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builtin = model_folder("builtin:cues")
    requested = []
    monkeypatch.setattr(
        "sgpo_async.model.export.load_tokenizer", lambda name: requested.append(name) or load_tokenizer(builtin)
    )
    model = load_model(builtin, device="cpu", dtype="float32")
    export(model, dict(model.named_parameters()), tmp_path, source="owner/model")
    assert requested == ["owner/model"]
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(load_tokenizer(builtin))
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


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
    """An explicit mask disables the block-diagonal mask, so packed sequences attend to each other."""
    policy = Policy(cases.tiny_model())
    backbone = policy.model.base_model
    forward = backbone.forward

    def leaking(**inputs: torch.Tensor) -> object:
        return forward(**{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})

    backbone.forward = leaking
    with pytest.raises(DataError, match="its log-probabilities change when sequences are packed"):
        check_model(policy)


def test_check_rejects_logits_that_are_not_hidden_times_matrix() -> None:
    policy = Policy(cases.tiny_model())
    policy.model.lm_head.bias = torch.nn.Parameter(torch.arange(13.0).double())
    with pytest.raises(DataError, match="hidden @ matrix"):
        check_model(policy)
