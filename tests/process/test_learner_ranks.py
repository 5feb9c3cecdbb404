"""Loss, gradient, checkpoint and publication on two gloo ranks. All tests share one pair of processes."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sgpo_async.config.schema import Run
from sgpo_async.engines import EmbeddedEngine
from sgpo_async.engines.base import Weights
from sgpo_async.errors import CheckpointError
from sgpo_async.learner import checkpoint, policy, publish, step
from sgpo_async.learner.batch import from_shard
from sgpo_async.learner.canary import CanaryScore
from sgpo_async.learner.checkpoint import CheckpointWriter, Saved
from sgpo_async.learner.patterns import Patterns
from sgpo_async.learner.publish import Publisher, gather
from sgpo_async.learner.step import Stepper
from sgpo_async.model.canary import Canary
from sgpo_async.weights import StoreFile, StoreReader, StoreWriter, digest
from sgpo_async.weights.short_digest import short_digest
from tests.reference import learner_cases as cases
from tests.reference.objectives import reference_loss
from tests.reference.variants import VARIANTS

pytestmark = pytest.mark.process

SPLITS = {"even": ((0, 1), (2, 3)), "uneven": ((0, 1, 2), (3,)), "empty": ((0, 1, 2, 3), ())}
COPIES: dict[str, dict[str, Any]] = {"frozen": {}, "ema": {"teacher_decay": 0.7}, "snapshot": {"teacher_every": 3}}
CANARY = Canary(np.array([1, 2, 3], np.int32), np.array([4, 5, 6, 7, 0, 1], np.int32))
PATTERNS = {"three": r"\b3\b", "never": "x"}
RUN = cases.settings(ranks=2, row_tokens=20, delta=2.0)


def worker(rank: int, folder: Path) -> None:
    """Compute everything that needs two ranks; rank 0 writes the results to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {f"gradient {name}": gradient(rank, split) for name, split in SPLITS.items()}
    results["gradient tied"] = gradient(rank, SPLITS["uneven"], tied=True)
    group, local = policy.GROUP_BYTES, step.LOCAL_GRADIENT_BYTES
    policy.GROUP_BYTES = step.LOCAL_GRADIENT_BYTES = 0
    results["gradient large"] = gradient(rank, SPLITS["uneven"])
    policy.GROUP_BYTES, step.LOCAL_GRADIENT_BYTES = group, local
    results["objectives"] = {name: objective(rank, name) for name in VARIANTS}
    results["mismatch"] = {name: mismatch(rank, split) for name, split in SPLITS.items()}
    results["patterns"] = {name: patterns(rank, split) for name, split in SPLITS.items()}
    results["frozen"] = gradient(rank, SPLITS["even"], frozen=True)
    results["teachers"] = {kind: teacher_copies(rank, kind) for kind in COPIES}
    results["resume"] = resume(rank, folder)
    results["published"] = published(rank)
    results["buckets"] = all(buckets(size) for size in (1, 3000, 2**20))
    results["write error"] = write_error(rank, folder)
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


def gradient(
    rank: int, split: tuple[tuple[int, ...], ...], *, tied: bool = False, frozen: bool = False
) -> tuple[float, dict[str, Tensor]]:
    run = replace(RUN, algorithm=replace(RUN.algorithm, teacher="frozen" if frozen else "self"))
    parts = cases.groups()
    stepper = cases.stepper(run, cases.tiny_model(tied=tied), cases.tiny_model(seed=1) if frozen else None)
    shard = cases.shard_of([parts[i] for i in split[rank]], problems=4)
    loss = stepper.accumulate(from_shard(shard, run.algorithm)).reduce()["loss"]
    return loss, {name: p.grad.full_tensor() for name, p in stepper.policy.model.named_parameters()}


def objective(rank: int, name: str) -> tuple[float, dict[str, Tensor]]:
    """One rank has three of the four problems, and therefore more micro-batches than the other rank."""
    run, parts = cases.settings(ranks=2, row_tokens=20, **VARIANTS[name]), cases.groups(seed=4)
    teacher = cases.tiny_model(seed=1) if run.algorithm.copies_teacher else None
    stepper = cases.stepper(run, cases.tiny_model(), teacher)
    shard = cases.shard_of([parts[i] for i in SPLITS["uneven"][rank]], problems=4)
    metrics = stepper.accumulate(stepper.batch(shard)).reduce()
    return metrics["loss"], {key: p.grad.full_tensor() for key, p in stepper.policy.model.named_parameters()}


def mismatch(rank: int, split: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    parts = cases.spread(cases.groups())
    shard = cases.shard_of([parts[i] for i in split[rank]], problems=4)
    stepper = cases.stepper(RUN, cases.tiny_model())
    return stepper.accumulate(from_shard(shard, RUN.algorithm)).reduce()


class Numbers:
    """A tokenizer whose texts are the token ids."""

    def decode(self, tokens: Any, skip_special_tokens: bool = False) -> str:
        return " ".join(str(token) for token in tokens)


def patterns(rank: int, split: tuple[tuple[int, ...], ...]) -> dict[str, Any]:
    run = replace(RUN, learner=replace(RUN.learner, patterns=PATTERNS, token_classes={"small": "[0-4]"}))
    stepper = cases.stepper(run, cases.tiny_model())
    stepper.patterns = Patterns(run.learner, Numbers())
    found = stepper.update(cases.shard_of([cases.groups()[i] for i in split[rank]], problems=4))
    return {key: found[key] for key in ("patterns", "kl_classes", "kl_mean")}


def train(stepper: Stepper, rank: int, steps: range) -> list[dict[str, Any]]:
    lines = []
    for number in steps:
        parts = [cases.groups(seed=number)[i] for i in SPLITS["even"][rank]]
        lines.append(stepper.update(cases.shard_of(parts, problems=4, step=number)))
    return lines


def teacher_copies(rank: int, kind: str) -> dict[str, Any]:
    """Return policy and copy after each of four updates, and how much of the copy each rank holds."""
    run = replace(RUN, algorithm=replace(RUN.algorithm, teacher=kind, **COPIES[kind]))
    stepper = cases.stepper(run, cases.tiny_model(), cases.tiny_model())
    copy = stepper.teacher.copy
    assert copy is not None
    found: dict[str, Any] = {"policy": [], "copy": []}
    for number in range(4):
        train(stepper, rank, range(number, number + 1))
        copy.reshard()
        found["policy"].append({name: p.full_tensor().detach() for name, p in stepper.policy.model.named_parameters()})
        found["copy"].append({name: p.full_tensor() for name, p in copy.model.named_parameters()})
    held: list[Any] = [None, None]
    dist.all_gather_object(held, {name: p.to_local().numel() for name, p in copy.model.named_parameters()})
    return found | {"held": held}


def learner(run: Run = RUN) -> Stepper:
    return cases.stepper(run, cases.tiny_model(dtype=torch.float32))


def resume(rank: int, folder: Path) -> dict[str, Any]:
    uninterrupted = train(learner(), rank, range(4))
    first, checkpoints = learner(), folder / "checkpoints"
    before = train(first, rank, range(2))
    saved = Saved({"step": 2}, b"the hub")
    with CheckpointWriter(checkpoints, keep=2, minutes=1e-9 if rank == 0 else 1e9) as writer:
        assert writer.due(by_steps=False)  # rank 0's clock decides
        writer.save(step=2, module=first.policy, optimiser=first.optimiser, saved=saved)
        train(first, rank, range(2, 4))  # collectives of training beside those of the checkpoint
    second, found = learner(), checkpoint.newest_whole(checkpoints)
    assert found is not None
    restored = checkpoint.restore(found, module=second.policy, optimiser=second.optimiser)
    names = sorted(path.name for path in found.iterdir())
    resumed = before + train(second, rank, range(2, 4))
    return {"uninterrupted": uninterrupted, "resumed": resumed, "saved": restored, "names": names}


def published(rank: int) -> dict[str, Any]:
    stepper, reported = learner(), []
    with closing(StoreFile("/nowhere")) as file:
        publisher = Publisher(
            stepper.policy,
            torch.bfloat16,
            store=StoreWriter(file.path) if rank == 0 else None,
            published=lambda version, own, canary, path, _secret: reported.append(
                (version, own, canary, StoreReader(path).version())
            ),
        )
        score = CanaryScore(policy=stepper.policy, canary=CANARY, dtype=torch.bfloat16, bfloat16=False)
        publisher.publish(0, score())
        train(stepper, rank, range(1))
        before = [p.to_local().clone() for p in stepper.policy.parameters()]
        publisher.publish(1, score())
        assert all(map(torch.equal, before, [p.to_local() for p in stepper.policy.parameters()])), "restored exactly"
        publisher.close()
        versions = {version: StoreReader(file.path).tensors(version) for version in range(2)} if rank == 0 else {}
    current = {name: p.full_tensor().detach() for name, p in stepper.policy.model.named_parameters()}
    return {"versions": versions, "reported": reported, "current": current}


def buckets(size: int) -> bool:
    """Return whether gathers of this size give the same tensors as `full_tensor`."""
    default, publish.BUCKET_BYTES = publish.BUCKET_BYTES, size
    stepper = learner()
    found = dict(gather(stepper.policy))
    publish.BUCKET_BYTES = default
    expected = {name: p.full_tensor() for name, p in stepper.policy.model.named_parameters()}
    return dist.get_rank() != 0 or all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def write_error(rank: int, folder: Path) -> str:
    """Return the error; only rank 0 cannot write, but both ranks must raise it."""
    if rank == 0:
        (folder / "file").write_text("", encoding="utf-8")
    dist.barrier()
    stepper = learner()
    try:
        with CheckpointWriter(folder / "file" / "checkpoints", keep=1) as writer:
            writer.save(step=1, module=stepper.policy, optimiser=stepper.optimiser, saved=Saved({}, b""))
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(folder,), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", ["even", "uneven", "empty", "tied", "large"])
def test_the_gradient_does_not_depend_on_the_division_over_ranks(results: dict[str, Any], name: str) -> None:
    model = cases.tiny_model(tied=name == "tied")
    loss = reference_loss(model, cases.groups(), RUN)
    loss.backward()
    assert results[f"gradient {name}"][0] == pytest.approx(loss.item(), abs=1e-10)
    for parameter_name, parameter in model.named_parameters():
        found = results[f"gradient {name}"][1][parameter_name]
        torch.testing.assert_close(found, parameter.grad, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_objective_depends_on_the_division_over_ranks(results: dict[str, Any], name: str) -> None:
    run, model = cases.settings(**VARIANTS[name]), cases.tiny_model()
    teacher = cases.tiny_model(seed=1) if run.algorithm.copies_teacher else None
    responses = cases.demonstrations if run.algorithm.needs_responses else lambda _: None
    start = cases.tiny_model(seed=cases.START) if run.algorithm.reference_kl else None
    loss = reference_loss(model, cases.groups(seed=4), run, teacher=teacher, responses=responses, start=start)
    loss.backward()
    found, gradient = results["objectives"][name]
    assert found == pytest.approx(loss.item(), abs=1e-10)
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[key], parameter.grad, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("name", SPLITS)
def test_the_mismatch_metrics_cover_all_ranks(results: dict[str, Any], name: str) -> None:
    expected = cases.reference_mismatch(cases.tiny_model(), cases.spread(cases.groups()))
    for key, value in expected.items():
        assert results["mismatch"][name][key] == pytest.approx(value, rel=1e-9), key


@pytest.mark.parametrize("name", SPLITS)
def test_patterns_and_classes_of_tokens_cover_all_ranks(results: dict[str, Any], name: str) -> None:
    found = results["patterns"][name]
    alone = [rollout for group in cases.groups() for rollout in group if not rollout.guided]
    share = sum(3 in rollout.tokens for rollout in alone) / len(alone)
    assert 0 < share < 1 and found["patterns"] == {"three": share, "never": 0.0}
    assert set(found["kl_classes"]) == {"small", "other"}
    assert found["kl_classes"] == pytest.approx(results["patterns"]["empty"]["kl_classes"], rel=1e-9)
    small, other = found["kl_classes"].values()
    assert small != other and min(small, other) < found["kl_mean"] < max(small, other)


def test_a_frozen_teacher_gives_the_same_loss_on_two_ranks(results: dict[str, Any]) -> None:
    model = cases.tiny_model()
    loss = reference_loss(model, cases.groups(), RUN, teacher=cases.tiny_model(seed=1))
    assert results["frozen"][0] == pytest.approx(loss.item(), abs=1e-10)


@pytest.mark.parametrize("kind", COPIES)
def test_a_teacher_copy_is_sharded_and_updated_on_every_rank(results: dict[str, Any], kind: str) -> None:
    found = results["teachers"][kind]
    expected = dict(cases.tiny_model().named_parameters())
    for steps, (student, copy) in enumerate(zip(found["policy"], found["copy"], strict=True), 1):
        copied = kind == "snapshot" and steps == 3
        if kind == "ema":
            expected = {name: 0.7 * tensor + 0.3 * student[name] for name, tensor in expected.items()}
        if copied:
            expected = student
        for name, tensor in expected.items():
            torch.testing.assert_close(copy[name], tensor.detach(), atol=1e-14, rtol=0)
        assert torch.equal(copy["model.norm.weight"], student["model.norm.weight"]) == copied
    first, second = found["held"]
    for name, tensor in expected.items():
        assert first[name] + second[name] == tensor.numel()
        assert max(first[name], second[name]) < tensor.numel()


def test_a_resumed_run_continues_bit_for_bit(results: dict[str, Any]) -> None:
    found = results["resume"]
    assert found["resumed"] == found["uninterrupted"]
    assert found["uninterrupted"][1] != found["uninterrupted"][2]
    assert found["saved"] == Saved({"step": 2}, b"the hub")
    assert {"progress.json", "hub.state", "random-0.pt", "random-1.pt", ".metadata", "manifest.json"} <= set(
        found["names"]
    )


def test_each_publication_contains_the_weights_at_that_time(results: dict[str, Any]) -> None:
    found = results["published"]
    initial = dict(cases.tiny_model(dtype=torch.float32).named_parameters())
    assert [(version, newest) for version, *_, newest in found["reported"]] == [(0, 0), (1, 1)]
    assert [own for _, own, *_ in found["reported"]] == [
        short_digest(digest(found["versions"][version].items())) for version in (0, 1)
    ]
    assert list(found["versions"][0]) == list(initial)
    for name, parameter in initial.items():
        assert torch.equal(found["versions"][0][name], parameter.detach().bfloat16())
        assert torch.equal(found["versions"][1][name], found["current"][name].bfloat16())
    assert not all(torch.equal(found["current"][name], parameter) for name, parameter in initial.items())


def test_the_learner_scores_the_canary_under_exactly_the_weights_that_it_publishes(results: dict[str, Any]) -> None:
    """Rounded to bfloat16, as an engine computes with them in float32."""
    found = results["published"]
    engine = EmbeddedEngine(cases.tiny_model(dtype=torch.float32), digest=digest, end_ids=[])
    engine.watch(CANARY, every_s=1e9)
    for version, own, score, *_ in found["reported"]:
        tensors = found["versions"][version]
        engine.load(Weights(version=version, digest=digest(tensors.items()), read=lambda held=tensors: held))
        engine.step(0.0)
        (scored,) = engine.canaries()
        assert (scored.version, scored.digest) == (version, own)
        np.testing.assert_allclose(scored.logprobs, score, atol=1e-5)
    first, second = (score for _, _, score, *_ in found["reported"])
    assert np.abs(first - second).mean() > 1e-4
    engine.load(Weights(version=2, digest=digest(found["current"].items()), read=lambda: found["current"]))
    engine.step(0.0)
    assert np.abs(engine.canaries()[0].logprobs - second).mean() > 1e-5, "what is not rounded gives another score"


def test_gathering_in_buckets_equals_gathering_each_parameter(results: dict[str, Any]) -> None:
    assert results["buckets"]


def test_the_error_of_a_checkpoint_that_cannot_be_written_is_one_line_on_every_rank(results: dict[str, Any]) -> None:
    assert "cannot write the checkpoint (rank 0: NotADirectoryError" in results["write error"]
    assert "\n" not in results["write error"]
