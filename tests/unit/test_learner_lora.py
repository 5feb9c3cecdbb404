"""Low-rank adapters: their gradient, the teacher, and every way of the adapters from the learner to an engine."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedModel

from sgpo_async.config import load
from sgpo_async.config.schema import Lora, Model, Run
from sgpo_async.engines.adapted import AdapterWeights, BaseModel
from sgpo_async.errors import ConfigError, WeightsError
from sgpo_async.learner import checkpoint, loading, optimiser
from sgpo_async.learner.batch import from_shard
from sgpo_async.learner.checkpoint import CheckpointWriter, Saved
from sgpo_async.learner.lora import adapt
from sgpo_async.learner.policy import Policy, decoder_layers
from sgpo_async.learner.progress import Progress
from sgpo_async.learner.publish import gather, gather_trained
from sgpo_async.learner.resume import require_same_adapters
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.teacher import Teacher
from sgpo_async.model.adapters import is_adapter, merge, save
from sgpo_async.weights.digest import digest
from tests.reference import learner_cases as cases
from tests.reference.objectives import reference_loss
from tests.unit.engines_models import engine_of, tiny

pytestmark = pytest.mark.usefixtures("one_rank")

LORA = Lora(rank=3, alpha=6.0)


def settings(lora: Lora = LORA, *, dtype: str = "float32", **keys: object) -> Run:
    run = cases.settings(**keys)
    return replace(run, seed=5, model=Model(dtype=dtype), learner=replace(run.learner, lora=lora))


def learner(run: Run, model: PreTrainedModel, *, trained: bool = True) -> Stepper:
    """A learner whose adapters have random values, as after some steps, or else their initial ones."""
    policy = loading.prepare(Policy(model), run, init_device_mesh("cpu", (dist.get_world_size(),)))
    torch.manual_seed(9)
    for name, parameter in policy.model.named_parameters():
        if trained and is_adapter(name):
            parameter.detach().to_local().copy_(torch.randn(parameter.shape) * 0.1)
    return Stepper(run, policy, optimiser.build(policy, run.optim), Teacher(run.algorithm, None))


def whole(stepper: Stepper) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor().clone() for name, p in stepper.policy.model.named_parameters()}


def with_weights(tensors: dict[str, Tensor], model: PreTrainedModel) -> PreTrainedModel:
    model.load_state_dict(tensors, strict=False)
    return model


@pytest.mark.parametrize("recompute", [0, 1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("teacher", ["self", "frozen"])
def test_the_gradient_of_the_adapters_is_that_of_the_merged_weights(
    teacher: str, tied: bool, recompute: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With W' = W + s B A: dL/dA = s B^T dL/dW' and dL/dB = s dL/dW' A^T. The frozen teacher is the model alone."""
    run, parts = settings(teacher=teacher), cases.groups()
    run = replace(run, learner=replace(run.learner, recompute=recompute))
    monkeypatch.setattr(loading, "adapt", partial(_adapt_in_float64, adapt))
    stepper = learner(run, cases.tiny_model(tied=tied))
    adapters = {name: tensor for name, tensor in whole(stepper).items() if is_adapter(name)}
    base = cases.tiny_model(tied=tied)
    merged = with_weights(_merged(base, adapters), cases.tiny_model(tied=tied))
    loss = reference_loss(merged, parts, run, teacher=base if teacher == "frozen" else None)
    loss.backward()
    slopes = {name: p.grad for name, p in merged.named_parameters()}

    batch = from_shard(cases.shard_of(parts, problems=len(parts)), run.algorithm)
    assert stepper.accumulate(batch).reduce()["loss"] == pytest.approx(loss.item(), abs=1e-10)
    for name, parameter in stepper.policy.model.named_parameters():
        if not is_adapter(name):
            assert parameter.grad is None
            continue
        stem = name.partition(".lora_")[0]
        down, up = adapters[f"{stem}.lora_A.weight"], adapters[f"{stem}.lora_B.weight"]
        slope = slopes[f"{stem}.weight"]
        expected = 2.0 * (up.T @ slope if "lora_A" in name else slope @ down.T)
        torch.testing.assert_close(parameter.grad.full_tensor(), expected, atol=1e-10, rtol=1e-9)


def _adapt_in_float64(function: Callable[..., None], *args: object, **_: object) -> None:
    function(*args, dtype=torch.float64)


def _merged(model: PreTrainedModel, adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Written from the definition, in the dtype of the model."""
    found = {}
    for name, tensor in model.named_parameters():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" in adapters:
            tensor = tensor + 2.0 * adapters[f"{stem}.lora_B.weight"] @ adapters[f"{stem}.lora_A.weight"]
        found[name] = tensor.detach()
    return found


def test_the_first_policy_is_the_model_itself_and_depends_on_the_seed_only() -> None:
    run = settings()
    first, again = (whole(learner(run, cases.tiny_model(dtype=torch.float32), trained=False)) for _ in range(2))
    other = whole(learner(replace(run, seed=6), cases.tiny_model(dtype=torch.float32), trained=False))
    downs = [name for name in first if "lora_A" in name]
    assert len(downs) == 2 * 7  # every linear layer of two decoder layers
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in downs)
    assert len({round(float(first[name].sum()), 6) for name in downs}) == len(downs)
    assert all(0.5 < float(first[name].abs().max()) * first[name].shape[1] ** 0.5 <= 1 for name in downs)
    merged = dict(merge(first, first, LORA.scale))
    assert all(torch.equal(merged[name], p) for name, p in cases.tiny_model(dtype=torch.float32).named_parameters())


def test_a_step_changes_only_the_adapters_and_only_they_are_published() -> None:
    stepper = learner(settings(), cases.tiny_model(dtype=torch.float32), trained=False)
    before = whole(stepper)
    stepper.update(cases.shard_of(cases.groups(), problems=4))
    stepper.update(cases.shard_of(cases.groups(seed=1), problems=4, step=1))
    after = whole(stepper)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if is_adapter(name)}
    published = dict(gather_trained(stepper.policy, torch.float32))
    assert published.keys() == changed
    assert {len(state) for state in stepper.optimiser.state.values()} == {3}  # step and two moments
    assert len(stepper.optimiser.state) == len(changed)


def test_targets_choose_the_layers() -> None:
    stepper = learner(settings(Lora(rank=2, targets=["q_proj", "down_proj"])), cases.tiny_model(dtype=torch.float32))
    stems = {name.partition(".lora_")[0].rpartition(".")[2] for name in whole(stepper) if is_adapter(name)}
    assert stems == {"q_proj", "down_proj"}


def test_an_unknown_target_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"learner.lora.targets: must be names .*\(down_proj, .* v_proj\), got \['c'\]"
    ):
        learner(settings(Lora(rank=2, targets=["q_proj", "c"])), cases.tiny_model(dtype=torch.float32))


def test_a_model_without_linear_layers_is_refused() -> None:
    model = tiny("gpt2")  # it has transformers' own Conv1D instead
    with pytest.raises(ConfigError, match=r"learner.lora.targets: must be names of .* \(it has none\)"):
        adapt(model, decoder_layers(model), LORA, dtype=torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_receives_the_adapters_serves_the_policy(tmp_path: Path, dtype: str) -> None:
    """The model stays in the engine's dtype, as the learner keeps it; only what is added is computed in float32."""
    cases.tiny_model(dtype=torch.float32, exact=False).save_pretrained(tmp_path / "model")
    stepper = learner(settings(dtype=dtype), cases.tiny_model(dtype=torch.float32, exact=False))
    adapters = dict(gather_trained(stepper.policy, torch.float32))
    weights = AdapterWeights(
        version=4, digest=digest(adapters.items()), read=adapters.copy, base=BaseModel(str(tmp_path / "model"), dtype),
        scale=LORA.scale,
    )  # fmt: skip
    tensors, announced = weights.copy()
    assert announced == digest(tensors.items())
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in gather(stepper.policy)}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert sum(not torch.equal(tensors[name], weights.base[name]) for name in tensors) == 14
    engine = engine_of(cases.tiny_model(dtype=torch.float32, exact=False))
    engine._digest = digest
    engine.load(weights)
    assert engine.version == 4


def test_damaged_adapters_and_those_of_another_model_are_refused(tmp_path: Path) -> None:
    cases.tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    base = BaseModel(str(tmp_path), "float32")
    adapters = dict(gather_trained(learner(settings(), cases.tiny_model(dtype=torch.float32)).policy, torch.float32))
    damaged = AdapterWeights(version=1, digest="0" * 32, read=adapters.copy, base=base, scale=2.0)
    with pytest.raises(WeightsError, match="version 1: the adapters have digest .*, but 0{32} was announced"):
        damaged.copy()
    foreign = {name.replace("layers.1", "layers.7"): tensor for name, tensor in adapters.items()}
    other = AdapterWeights(version=1, digest=digest(foreign.items()), read=foreign.copy, base=base, scale=2.0)
    with pytest.raises(WeightsError, match=r"no weight for the adapter model.layers.7.*need the same model.path"):
        other.copy()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_base_of_a_node_is_the_model_whether_or_not_it_can_be_read_in_slices(tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    base = BaseModel(str(tmp_path), "float32")
    expected = dict(model.named_parameters())
    assert list(base) == list(expected) and len(base) == len(expected)
    assert all(torch.equal(base[name], parameter) for name, parameter in expected.items())


def test_peft_loads_the_adapter_and_computes_the_same_policy(tmp_path: Path) -> None:
    cases.tiny_model(dtype=torch.float32, exact=False).save_pretrained(tmp_path / "model")
    lora = Lora(rank=3, alpha=6.0, targets=["q_proj", "v_proj", "up_proj"])
    stepper = learner(settings(lora), cases.tiny_model(dtype=torch.float32, exact=False))
    adapters = dict(gather_trained(stepper.policy, torch.float32))
    save(adapters, lora, tmp_path / "adapter", base=str(tmp_path / "model"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(11)[None] % cases.VOCABULARY
    merged = with_weights(dict(gather(stepper.policy)), cases.tiny_model(dtype=torch.float32, exact=False))
    expected = merged(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
    with loaded.disable_adapter():
        assert not torch.allclose(loaded(ids).logits, expected, atol=1e-2)


def test_a_checkpoint_has_the_adapters_alone_and_restores_them(tmp_path: Path) -> None:
    run = settings()
    stepper = learner(run, cases.tiny_model(dtype=torch.float32), trained=False)
    stepper.update(cases.shard_of(cases.groups(), problems=4))
    with CheckpointWriter(tmp_path, keep=1) as writer:
        about = {"module": stepper.policy, "optimiser": stepper.optimiser, "saved": Saved({"step": 1}, b"")}
        writer.save(step=1, **about)
    path = tmp_path / "step-00000001"
    content = b"".join(file.read_bytes() for file in path.glob("*"))
    assert b"lora_A" in content and b"embed_tokens" not in content
    second = learner(replace(run, seed=77), cases.tiny_model(dtype=torch.float32), trained=False)
    checkpoint.restore(path, module=second.policy, optimiser=second.optimiser)
    for shard in (cases.shard_of(cases.groups(seed=2), problems=4, step=1),):
        assert stepper.update(shard) == second.update(shard)
    assert all(torch.equal(tensor, whole(second)[name]) for name, tensor in whole(stepper).items())


def test_the_adapters_of_a_checkpoint_can_be_read_without_a_process_group(tmp_path: Path) -> None:
    stepper = learner(settings(), cases.tiny_model(dtype=torch.float32))
    with CheckpointWriter(tmp_path, keep=1) as writer:
        saved = Saved({"step": 1}, b"")
        writer.save(step=1, module=stepper.policy, optimiser=stepper.optimiser, saved=saved)
    model = cases.tiny_model(dtype=torch.float32)
    adapt(model, decoder_layers(model), LORA, dtype=torch.float32)
    checkpoint.read_weights(tmp_path / "step-00000001", Policy(model))
    parameters = dict(model.named_parameters())
    expected = dict(gather(stepper.policy))
    assert all(torch.equal(expected[name], tensor) for name, tensor in merge(parameters, parameters, LORA.scale))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learner.lora.rank=-1"], "learner.lora.rank must be >= 0, got -1"),
        (["learner.lora.alpha=0"], "learner.lora.alpha must be > 0, got 0"),
        (
            ["learner.lora.rank=8", "algorithm.teacher=snapshot"],
            "algorithm.teacher must be frozen, self or behaviour with learner.lora.rank > 0, got 'snapshot'",
        ),
        (
            ["learner.lora.rank=8", "engine.kind=sglang", "engine.sglang.transport=distributed"],
            "engine.sglang.transport must be tensor or disk with learner.lora.rank > 0",
        ),
    ],
)
def test_settings_that_adapters_do_not_allow_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("", overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"), [({"rank": 4}, "rank must be 3"), ({"alpha": 9.0}, "alpha must be 6.0")]
)
def test_a_checkpoint_of_other_adapters_is_refused(tmp_path: Path, changed: dict[str, float], message: str) -> None:
    progress = Progress(lora=asdict(LORA))
    (tmp_path / "progress.json").write_text(json.dumps(progress.plain()), encoding="utf-8")
    require_same_adapters(settings(), tmp_path)
    with pytest.raises(ConfigError, match=f"learner.lora.{message}, as in {tmp_path}, got"):
        require_same_adapters(settings(replace(LORA, **changed)), tmp_path)
    (tmp_path / "progress.json").write_text("{}", encoding="utf-8")
    require_same_adapters(settings(), tmp_path)
