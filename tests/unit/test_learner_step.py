"""One step on one rank: packed loss and gradient compared with Eq. 7 computed sequence by sequence, in float64."""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from sgpo_async.algorithm import linear
from sgpo_async.config.schema import Correction, Run
from sgpo_async.engines import EmbeddedEngine, Generate, Generated, SampledTokens, Weights
from sgpo_async.errors import DataError, SgpoError
from sgpo_async.learner import policy, step
from sgpo_async.learner.batch import LeftOut, Sequences, from_shard
from sgpo_async.learner.division import Piece, divide
from sgpo_async.learner.objectives.base import Likelihood
from sgpo_async.learner.packing import Tokens, pack, repeated_tokens
from sgpo_async.weights import digest
from sgpo_async.wire.records import Rollout
from tests.reference import learner_cases as cases
from tests.reference.objectives import reference_loss

pytestmark = pytest.mark.usefixtures("one_rank", "small_chunks")

MODES = ("none", "token", "token-mask", "prefix", "sequence", "sequence-geometric")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the rows of every sequence into several chunks of the fused loss, as in a model of real size."""
    monkeypatch.setattr(linear, "CPU_SIZES", linear.Sizes(chunk=3 * cases.VOCABULARY, block=2 * cases.VOCABULARY))


def gradients(
    run: Run, parts: list[list[Rollout]], *, tied: bool = False, frozen: bool = False
) -> tuple[float, dict[str, Tensor]]:
    stepper = cases.stepper(run, cases.tiny_model(tied=tied), cases.tiny_model(seed=1) if frozen else None)
    batch = from_shard(cases.shard_of(parts, problems=len(parts)), run.algorithm)
    loss = stepper.accumulate(batch).reduce()["loss"]
    return loss, {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}


def expected(
    run: Run, parts: list[list[Rollout]], *, tied: bool = False, frozen: bool = False
) -> tuple[float, dict[str, Tensor]]:
    model = cases.tiny_model(tied=tied)
    loss = reference_loss(model, parts, run, teacher=cases.tiny_model(seed=1) if frozen else None)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_equal(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], abs=1e-10)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("row_tokens", [1, 20, 40, 10_000])
def test_packed_loss_and_gradient_equal_the_reference_without_packing(tied: bool, row_tokens: int) -> None:
    run, parts = cases.settings(row_tokens=row_tokens, delta=2.0), cases.groups()
    reference = expected(run, parts, tied=tied)
    assert max(float(g.abs().max()) for g in reference[1].values()) > 1e-3
    assert_equal(gradients(run, parts, tied=tied), reference)


@pytest.mark.parametrize("tied", [False, True])
def test_one_fsdp_group_per_layer_gives_the_same_loss_and_gradient(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models use one FSDP group per decoder layer and reduce gradients after each micro-batch."""
    monkeypatch.setattr(policy, "GROUP_BYTES", 0)
    monkeypatch.setattr(step, "LOCAL_GRADIENT_BYTES", 0)
    run, parts = cases.settings(row_tokens=20, delta=2.0), cases.groups()
    assert_equal(gradients(run, parts, tied=tied), expected(run, parts, tied=tied))


@pytest.mark.parametrize("layers", [False, True])
def test_recomputing_activations_gives_the_same_gradient_with_less_memory(
    layers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layers:  # one FSDP group per decoder layer, as for large models
        monkeypatch.setattr(policy, "GROUP_BYTES", 0)
        monkeypatch.setattr(step, "LOCAL_GRADIENT_BYTES", 0)
    run, parts = cases.settings(row_tokens=20, delta=2.0), cases.groups()
    reference = expected(run, parts)
    saved_elements = []
    for every in (0, 1, 2):  # none, both, and the first of the two layers
        model = cases.tiny_model()
        policy.recompute(policy.Policy(model), every)
        stepper = cases.stepper(run, model)
        sizes: list[int] = []

        def count(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = stepper.accumulate(from_shard(cases.shard_of(parts, problems=len(parts)), run.algorithm)).reduce()
        found = {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}
        assert_equal((loss["loss"], found), reference)
        saved_elements.append(sum(sizes))
    none, both, first = saved_elements
    assert both < 0.7 * none and both < first < none


@pytest.mark.parametrize(("every", "layers"), [(1, 2), (2, 1)])
def test_of_a_recomputed_layer_only_the_input_goes_to_host_memory(
    every: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor [1, W, 16] per layer and row; no parameter, although FSDP gathers them inside the layer's call."""
    shapes: list[torch.Size] = []

    def counting(*, pin_memory: bool) -> torch.autograd.graph.saved_tensors_hooks:
        assert pin_memory
        return torch.autograd.graph.saved_tensors_hooks(lambda t: (shapes.append(t.shape), t)[1], lambda t: t)

    monkeypatch.setattr(policy, "GROUP_BYTES", 0)
    monkeypatch.setattr(policy, "save_on_cpu", counting)
    run, parts, model = cases.settings(row_tokens=20), cases.groups(), cases.tiny_model()
    policy.recompute(policy.Policy(model), every, offload=True)
    stepper = cases.stepper(run, model)
    rows: list[torch.Size] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, output: rows.append(output.shape) if torch.is_grad_enabled() else None
    )
    stepper.accumulate(from_shard(cases.shard_of(parts, problems=len(parts)), run.algorithm))
    assert len(rows) > 3
    assert shapes == [row for row in rows for _ in range(layers)]


@pytest.mark.parametrize("mode", MODES)
def test_every_correction_equals_the_reference(mode: str) -> None:
    rule = Correction(mode=mode, bound=2.0)
    run, parts = cases.settings(grpo_correction=rule, kl_correction=rule, delta=2.0), cases.groups(seed=3)
    assert_equal(gradients(run, parts), expected(run, parts))


@pytest.mark.parametrize(
    ("objective", "bound"),
    [("sgpo", 1.1), ("sgpo", 3.0), ("rlsd", 3.0), ("rlcsd", 3.0), ("iw-opd", 1.1), ("pi-distill", 3.0)],
)
def test_ppo_s_clip_against_the_behaviour_policy_equals_the_reference(objective: str, bound: float) -> None:
    rule = Correction(mode="clip", bound=bound)
    run = cases.settings(grpo_correction=rule, objective=objective, **IN_CONTEXT)
    parts = cases.groups(seed=3)
    stepper = cases.stepper(run, cases.tiny_model())
    statistics = stepper.accumulate(stepper.batch(cases.shard_of(parts, problems=len(parts))))
    metrics = statistics.reduce()
    found = {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}
    model = cases.tiny_model()
    loss = reference_loss(model, parts, run)
    loss.backward()
    assert_equal((metrics["loss"], found), (loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    assert 0 < metrics["correction_clipped"] < 1
    assert metrics["correction_min"] == 0


@pytest.mark.parametrize("limiter", ["mask", "none"])
def test_a_frozen_teacher_equals_the_reference(limiter: str) -> None:
    run, parts = cases.settings(teacher="frozen", limiter=limiter), cases.groups(seed=1)
    assert_equal(gradients(run, parts, frozen=True), expected(run, parts, frozen=True))


def test_a_frozen_teacher_gets_no_gradient_and_does_not_change() -> None:
    run = cases.settings(teacher="frozen")
    stepper = cases.stepper(run, cases.tiny_model(), cases.tiny_model(seed=1))
    stepper.update(cases.shard_of(cases.groups(), problems=4))
    assert stepper.teacher.copy is not None
    stepper.teacher.copy.reshard()
    for name, parameter in cases.tiny_model(seed=1).named_parameters():
        frozen = stepper.teacher.copy.model.get_parameter(name)
        assert frozen.grad is None
        assert torch.equal(frozen.full_tensor(), parameter)


OBSERVED_RUNS = {
    **{f"correction {mode}": {"grpo_correction": Correction(mode=mode, bound=2.0)} for mode in MODES},
    "clip": {"grpo_correction": Correction(mode="clip", bound=2.0)},
    "prefix of the teacher": {"kl_correction": Correction(mode="prefix", bound=1.0)},
    "behaviour as the teacher": {"teacher": "behaviour", "limiter": "none"},
    "all targets": {"target": "all", "limiter": "quantile", "quantile": 0.7},
    "likelihood of the targets": {"divergence": "sft"},
    "corrected pass rates": {"pass_rates": "corrected"},
    "luffy": {"objective": "luffy"},
}


IN_CONTEXT: dict[str, object] = {"limiter": "none", "kl_correction": Correction(mode="none", bound=1.0)}
METHODS = ["opsd", "sdpo", "kdrl", "rlsd", "rlcsd", "iw-opd", "pi-distill", "pope"]


@pytest.mark.parametrize("observations", [False, True])
@pytest.mark.parametrize("objective", METHODS)
def test_methods_in_context_train_truncated_rollouts_and_those_of_environments(
    objective: str, observations: bool
) -> None:
    """What an environment wrote is read and not trained; ratios are over what was kept, also of the teacher."""
    run, parts = cases.settings(row_tokens=20, objective=objective, alpha=0.5, **IN_CONTEXT), cases.groups(seed=4)
    run = replace(run, rollout=replace(run.rollout, top_k=cases.VOCABULARY))
    parts = cases.truncated(cases.with_observations(parts) if observations else parts)
    stepper = cases.stepper(run, cases.tiny_model())
    metrics = stepper.accumulate(stepper.batch(cases.shard_of(parts, problems=len(parts)))).reduce()
    found = {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}
    model = cases.tiny_model()
    expected = reference_loss(model, parts, run)
    expected.backward()
    assert_equal((metrics["loss"], found), (expected.item(), {name: p.grad for name, p in model.named_parameters()}))


@pytest.mark.parametrize("algorithm", OBSERVED_RUNS.values(), ids=OBSERVED_RUNS.keys())
def test_what_an_environment_wrote_is_read_and_not_trained(algorithm: dict[str, object]) -> None:
    """The reference computes the loss over the sampled tokens only."""
    run, parts = cases.settings(row_tokens=20, **algorithm), cases.with_observations(cases.groups(seed=4))
    assert sum(not own for group in parts for rollout in group for own in rollout.sampled) > 20
    stepper = cases.stepper(run, cases.tiny_model())
    loss = stepper.accumulate(stepper.batch(cases.shard_of(parts, problems=len(parts)))).reduce()["loss"]
    found = {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}
    model = cases.tiny_model()
    expected = reference_loss(model, parts, run, responses=cases.demonstrations)
    expected.backward()
    assert_equal((loss, found), (expected.item(), {name: p.grad for name, p in model.named_parameters()}))


@pytest.mark.parametrize("observations", [False, True])
@pytest.mark.parametrize("algorithm", OBSERVED_RUNS.values(), ids=OBSERVED_RUNS.keys())
def test_truncated_rollouts_are_trained_with_probabilities_over_what_was_kept(
    algorithm: dict[str, object], observations: bool
) -> None:
    run, parts = cases.settings(row_tokens=20, temperature=0.8, **algorithm), cases.groups(seed=4)
    plain, run = run, replace(run, rollout=replace(run.rollout, top_k=cases.VOCABULARY))
    parts = cases.truncated(cases.with_observations(parts) if observations else parts)
    stepper = cases.stepper(run, cases.tiny_model())
    metrics = stepper.accumulate(stepper.batch(cases.shard_of(parts, problems=len(parts)))).reduce()
    found = {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}
    model = cases.tiny_model()
    expected = reference_loss(model, parts, run, responses=cases.demonstrations)
    expected.backward()
    assert_equal((metrics["loss"], found), (expected.item(), {name: p.grad for name, p in model.named_parameters()}))
    own = [rollout for group in parts for rollout in group if not rollout.guided]
    tokens = sum(int(rollout.sampled.sum()) for rollout in own)
    assert metrics["kept_mean"] == pytest.approx(1 + sum(int(r.kept_sizes.sum()) for r in own) / tokens)

    whole = [[replace(rollout, kept=None, kept_sizes=None) for rollout in group] for group in parts]
    other = cases.stepper(plain, cases.tiny_model())
    metrics = other.accumulate(other.batch(cases.shard_of(whole, problems=len(parts)))).reduce()
    assert metrics["kept_mean"] is None
    assert any(
        not torch.allclose(p.grad.full_tensor(), found[name]) for name, p in other.policy.model.named_parameters()
    )


@pytest.mark.parametrize("truncated", [False, True])
def test_rollouts_with_other_limits_than_the_runs_are_refused(truncated: bool) -> None:
    """A resumed run may have other settings than the one that sampled the buffered rollouts."""
    run = cases.settings()
    run = run if truncated else replace(run, rollout=replace(run.rollout, top_p=0.9, top_k=4))
    parts = cases.truncated(cases.groups()) if truncated else cases.groups()
    stepper = cases.stepper(run, cases.tiny_model())
    with pytest.raises(
        DataError, match="task 0: .*; resume with the rollout.top_p and rollout.top_k of the run's start"
    ):
        stepper.batch(cases.shard_of(parts, problems=4))


def test_a_stale_token_is_masked_with_what_was_kept_beside_it() -> None:
    """With hub.stale=mask the older half of a rollout is not trained: nor do its kept tokens count."""
    run, parts = cases.settings(), cases.truncated(cases.spread(cases.groups()))
    stepper = cases.stepper(run, cases.tiny_model())
    batch = from_shard(cases.shard_of(parts, problems=4), run.algorithm, left_out=LeftOut(older=5))
    rollouts = [item.rollout for item in batch.sequences.policy_gradient]
    assert any((rollout.kept_sizes[~rollout.sampled] > 0).any() for rollout in rollouts)
    metrics = stepper.accumulate(batch).reduce()
    tokens = sum(int(rollout.sampled.sum()) for rollout in rollouts)
    kept = sum(int(rollout.kept_sizes[rollout.sampled].sum()) for rollout in rollouts)
    assert metrics["kept_mean"] == pytest.approx(1 + kept / tokens)


def test_at_lag_0_a_truncated_engine_and_the_learner_agree() -> None:
    """The embedded engine samples with top-p and top-k; log pi/mu is 0 up to rounding, and not without the kept set."""
    run = cases.settings(temperature=0.8)
    model = cases.tiny_model(dtype=torch.float32, exact=False)
    engine = EmbeddedEngine(copy.deepcopy(model), digest=digest, slots=16, end_ids=[0])
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    engine.load(Weights(version=5, digest=digest(tensors.items()), read=tensors.copy))
    parts = []
    for group in cases.groups():
        for rollout in group:
            engine.submit(
                Generate(
                    id=rollout.slot,
                    prompt=rollout.prompt,
                    max_new_tokens=12,
                    temperature=0.8,
                    seed=rollout.task * 10 + rollout.slot,
                    top_p=0.9,
                    top_k=6,
                    report_kept=True,
                )
            )
        found: dict[int, Generated] = {}
        while len(found) < len(group):
            found |= {result.id: result for result in engine.step(0)}
        names = [field.name for field in fields(SampledTokens) if not field.name.startswith("top_")]
        parts.append([replace(r, **{name: getattr(found[r.slot], name) for name in names}) for r in group])
    metrics = {}
    for name, change in (("kept", {}), ("whole", {"kept": None, "kept_sizes": None})):
        rollouts = [[replace(rollout, **change) for rollout in group] for group in parts]
        learner = cases.stepper(run, copy.deepcopy(model))
        batch = from_shard(cases.shard_of(rollouts, problems=4), run.algorithm)
        metrics[name] = learner.accumulate(batch).reduce()
    assert metrics["kept"]["mismatch_max_lag0_first"] < 1e-5
    assert metrics["kept"]["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["whole"]["mismatch_mean_lag0_first"] > 0.01
    assert 1 < metrics["kept"]["kept_mean"] <= 6


def test_an_observed_token_changes_what_follows_it() -> None:
    """It is read: another observation leads to another gradient."""
    run, parts = cases.settings(), cases.with_observations(cases.groups())

    def other(rollout: Rollout) -> Rollout:
        changed = (rollout.tokens + 1) % cases.VOCABULARY
        return replace(rollout, tokens=np.where(rollout.sampled, rollout.tokens, changed).astype(np.int32))

    assert gradients(run, parts)[0] != gradients(run, [[other(r) for r in group] for group in parts])[0]


def test_alpha_0_gives_exactly_grpo() -> None:
    """The results are equal bit for bit."""
    parts = cases.groups()
    sgpo = gradients(cases.settings(alpha0=0.0), parts)
    grpo = gradients(cases.settings(objective="grpo"), parts)
    assert sgpo[0] == grpo[0]
    assert all(torch.equal(gradient, grpo[1][name]) for name, gradient in sgpo[1].items())


def test_without_a_correct_guided_rollout_nothing_is_distilled() -> None:
    """Autonomous rewards are equal, so only distillation could give a gradient; the gradient is exactly 0."""
    failed = [[replace(r, reward=0.0, unguided_logprob=None) for r in group] for group in cases.groups()]
    loss, found = gradients(cases.settings(), failed)
    assert loss == 0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in found.values())


def test_a_group_with_uniform_rewards_is_distilled() -> None:
    group = cases.groups()[3]
    assert {r.reward for r in group if not r.guided} == {0.0}
    loss, found = gradients(cases.settings(delta=100.0), [group])
    assert loss > 0
    assert any(torch.count_nonzero(gradient) for gradient in found.values())


@pytest.mark.parametrize("everything_uniform", [False, True])
def test_leaving_out_rollouts_of_uniform_groups_gives_the_same_gradient(everything_uniform: bool) -> None:
    parts = cases.groups()
    if everything_uniform:
        parts = [[replace(r, reward=0.0, unguided_logprob=None) for r in group] for group in parts]
    run, shard = cases.settings(delta=2.0), cases.shard_of(parts, problems=len(parts))
    whole = from_shard(shard, run.algorithm)
    stepper = cases.stepper(run, cases.tiny_model())
    skipping = replace(run, learner=replace(run.learner, skip_uniform=True))
    reduced = replace(stepper, run=skipping).batch(shard)
    trained = [[r for r in whole.sequences.policy_gradient if r.rollout.task == task] for task in range(len(parts))]
    sizes = [len(group) if any(r.advantage for r in group) else 1 for group in trained]
    assert [sum(r.rollout.task == task for r in reduced.sequences.policy_gradient) for task in range(4)] == sizes
    assert sizes == ([1] * 4 if everything_uniform else [4, 4, 4, 1])
    loss = stepper.accumulate(reduced).reduce()["loss"]
    found = {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}
    assert_equal((loss, found), gradients(run, parts))


def test_the_entropy_counts_the_rollout_of_a_uniform_group_for_those_that_are_left_out() -> None:
    run, parts = cases.settings(), cases.groups()
    batch = from_shard(cases.shard_of(parts, problems=4), run.algorithm, left_out=LeftOut(uniform=True))
    model, total, tokens = cases.tiny_model(), 0.0, 0
    for group in parts:
        own = [r for r in group if not r.guided]
        uniform = len({r.reward for r in own}) == 1
        for rollout in [own[group[0].task % 4]] if uniform else own:
            log_pi = cases.log_probs(model, rollout.prompt, rollout.tokens).detach()
            total += (4 if uniform else 1) * float(-(log_pi.exp() * log_pi).sum())
            tokens += (4 if uniform else 1) * len(rollout.tokens)
    metrics = cases.stepper(run, cases.tiny_model()).accumulate(batch).reduce()
    assert metrics["entropy"] == pytest.approx(total / tokens)


@pytest.mark.parametrize("local_gradients", [True, False])
def test_a_batch_in_parts_gives_the_same_gradient_and_metrics(
    local_gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not local_gradients:
        monkeypatch.setattr(step, "LOCAL_GRADIENT_BYTES", 0)
    run, groups = cases.settings(delta=2.0), cases.groups()
    whole, divided = (cases.stepper(run, cases.tiny_model()) for _ in range(2))
    expected = whole.accumulate(whole.batch(cases.shard_of(groups, problems=4))).reduce()
    for part in (groups[:1], [], groups[1:3]):
        divided.add(cases.shard_of(part, problems=4))
    last = divided.batch(cases.shard_of(groups[3:], problems=4))
    found = divided.accumulate(last).reduce()
    for own, other in zip(divided.policy.parameters(), whole.policy.parameters(), strict=True):
        torch.testing.assert_close(own.grad.full_tensor(), other.grad.full_tensor(), atol=1e-12, rtol=1e-9)
    assert found.keys() == expected.keys()
    assert all(found[name] == pytest.approx(expected[name]) for name in found.keys() - {"imbalance"})
    assert [metrics["alpha"] for metrics in divided.statistics.problems] == pytest.approx(
        [metrics["alpha"] for metrics in whole.statistics.problems]
    )
    again = divided.accumulate(divided.batch(cases.shard_of(groups, problems=4)))
    assert again is not whole.statistics and len(again.problems) == 4, "the next step has statistics of its own"


def test_an_empty_strategy_gives_no_distillation_loss() -> None:
    """If teacher and student have the same prompt, every d_t is 0."""
    parts = cases.groups()
    same = [[replace(r, prompt=group[0].prompt) for r in group] for group in parts]
    run = cases.settings()
    stepper = cases.stepper(run, cases.tiny_model())
    metrics = stepper.accumulate(from_shard(cases.shard_of(same, problems=4), run.algorithm)).reduce()
    assert metrics["kl_mean"] == pytest.approx(0, abs=1e-12)
    assert metrics["kl_masked_fraction"] == 0


def test_the_metrics_of_a_step_equal_plain_loops() -> None:
    run, parts = cases.settings(grpo_correction=Correction(mode="token", bound=1.5)), cases.groups(seed=2)
    stepper, model = cases.stepper(run, cases.tiny_model()), cases.tiny_model()
    batch = from_shard(cases.shard_of(parts, problems=4), run.algorithm)
    metrics = stepper.accumulate(batch).reduce()
    own = [r for group in parts for r in group if not r.guided]
    ratios: list[tuple[int, float]] = []
    for rollout in own:
        log_pi = cases.log_probs(model, rollout.prompt, rollout.tokens).detach().numpy()
        for t, token in enumerate(rollout.tokens):
            start = next(s for s, end in enumerate(rollout.ends) if t < end)
            ratios.append((5 - int(rollout.versions[start]), float(np.exp(log_pi[t, token] - rollout.logprobs[t]))))
    stale = [ratio for lag, ratio in ratios if lag == 1]
    assert metrics["correction_mean"] == pytest.approx(np.mean([min(r, 1.5) for _, r in ratios]))
    assert metrics["correction_mean_stale"] == pytest.approx(np.mean([min(r, 1.5) for r in stale]))
    assert metrics["correction_min_stale"] == pytest.approx(min(stale))
    assert metrics["correction_clipped_stale"] == pytest.approx(np.mean([r > 1.5 for r in stale]))
    assert metrics["ratio_mean"] == pytest.approx(np.mean([r for _, r in ratios]))  # over GRPO tokens only
    assert metrics["ratio_by_lag"]["1"] == pytest.approx(np.mean(stale))
    targets = sum(len(item.rollout.tokens) for item in batch.sequences.distillation)
    assert metrics["tokens"] == len(ratios) + targets == sum(metrics["lag_histogram"].values())
    assert set(metrics["lag_histogram"]) == {"0", "1"}


def test_updates_follow_the_schedule_and_are_reproducible_bit_for_bit() -> None:
    run, shard = cases.settings(), cases.shard_of(cases.groups(), problems=4)
    first, second = (cases.stepper(run, cases.tiny_model(dtype=torch.float32)) for _ in range(2))
    lines = [first.update(replace(shard, step=step)) for step in range(3)]
    assert [line["lr"] for line in lines] == [0.005, 0.01, 0.01]
    assert lines == [second.update(replace(shard, step=step)) for step in range(3)]
    assert lines[0]["loss"] != lines[1]["loss"]


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    run, parts = cases.settings(), cases.groups()
    broken = [[replace(r, logprobs=np.full_like(r.logprobs, np.nan)) for r in group] for group in parts]
    stepper = cases.stepper(run, cases.tiny_model())
    with pytest.raises(
        SgpoError, match="^step 0: the norm of the gradient must be finite, got nan; lower optim.lr or optim.grad_clip$"
    ):
        stepper.update(cases.shard_of(broken, problems=4))


def test_sequences_of_one_prompt_are_divided_together_and_fit_into_a_row() -> None:
    shared = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, 9, int(n)).astype(np.int32) for n in rng.integers(1, 12, 3)]
        longest = int(rng.choice([3, 30, 90]))
        items = [
            Likelihood(Tokens(prompts[rng.integers(3)], rng.integers(0, 9, int(n)).astype(np.int32)), 1.0)
            for n in rng.integers(1, longest + 1, 14)
        ]
        row_tokens = int(rng.integers(1, 120))
        bundles = Sequences.of(items).bundles(row_tokens)
        assert sorted(id(item) for bundle in bundles for item in bundle) == sorted(map(id, items))
        for bundle in bundles:
            assert all(np.array_equal(item.student.prompt, bundle[0].student.prompt) for item in bundle)
        students = [[item.student for item in bundle] for bundle in bundles]
        sizes = [sum(t.length for t in own) - repeated_tokens(own, row_tokens) for own in students]
        for (own,) in divide([Piece(size, float(size)) for size in sizes], ranks=1, row_tokens=row_tokens):
            row = pack([tokens for i in own for tokens in students[i]], row_tokens)
            assert row.input_ids.size <= row_tokens or len(own) == len(students[own[0]]) == 1
            shared += row.shared is not None
    assert shared > 20
