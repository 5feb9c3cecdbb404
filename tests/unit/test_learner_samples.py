"""Samples of a step: which groups are kept, and what their lines contain."""

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from transformers import AutoTokenizer

from sgpo_async.cli.sample_text import render
from sgpo_async.config.schema import Correction, Learner, Run
from sgpo_async.learner.contexts import InContext
from sgpo_async.learner.process_group import join_alone
from sgpo_async.learner.samples import Samples, chosen, decode, pieces
from sgpo_async.learner.step import Stepper
from sgpo_async.metrics.samples import read_samples
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.report.texts import sibling_note, versions_of
from sgpo_async.tasks.sources import source_of
from sgpo_async.tasks.task_sampler import derived_seed
from sgpo_async.wire.records import OBSERVED, Rollout, Shard
from tests.reference import learner_cases as cases
from tests.reference.sgpo import forward_kl

SETTINGS = cases.settings()


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    join_alone()
    yield
    dist.destroy_process_group()


def trained(run: Run = SETTINGS, *, seed: int = 0) -> tuple[Stepper, Shard]:
    """A learner that has trained on one shard."""
    stepper = cases.stepper(run, cases.tiny_model())
    shard = cases.shard_of(cases.groups(seed=seed), problems=4)
    stepper.update(shard)
    return stepper, shard


def test_the_groups_with_the_smallest_draws_are_kept() -> None:
    stepper, shard = trained()
    assert stepper.statistics is not None
    order = sorted(range(4), key=lambda task: derived_seed(7, "samples", task))
    for number in (1, 2, 4, 9):
        kept, kl = chosen([shard], stepper.statistics, number, seed=7)
        assert [group.rollouts[0].task for group in kept] == order[:number]
        assert all(len(group.rollouts) == 7 for group in kept)
        taught = sorted({own.rollout.task for own in stepper.statistics.distilled}, key=order.index)
        assert {task for task, _ in kl} == set(taught[:number]), "of the tasks that this rank has distilled"


def test_the_choice_does_not_depend_on_the_position_in_the_batch() -> None:
    """Of many batches of 8 consecutive tasks, each position is chosen about equally often."""
    draws = [min(range(8), key=lambda i: derived_seed(0, "samples", 8 * batch + i)) for batch in range(4000)]
    counts = Counter(draws)
    assert all(400 < counts[position] < 600 for position in range(8)), counts


def test_the_divergences_are_those_of_the_loss() -> None:
    stepper, shard = trained()
    statistics = stepper.statistics
    assert statistics is not None
    kept, kl = chosen([shard], statistics, 4, seed=0)
    values = list(kl.values())
    assert len(values) == int(statistics.sums["targets"]) == 3  # the first group has no correct guided rollout
    assert sum(own.d.sum() for own in values) == pytest.approx(float(statistics.sums["kl"]))
    model = cases.tiny_model()
    for group in kept:
        assert (group.alpha > 0) == any(task == group.rollouts[0].task for task, _ in kl)
        for rollout in group.rollouts:
            if (rollout.task, rollout.slot) not in kl:
                continue
            assert rollout.guided and rollout.reward > 0
            student, teacher = (
                cases.log_probs(model, prompt, rollout.tokens).detach().numpy()
                for prompt in (group.rollouts[0].prompt, rollout.prompt)
            )
            np.testing.assert_allclose(kl[rollout.task, rollout.slot].d, forward_kl(teacher, student), rtol=1e-5)


def observed(rollout: Rollout) -> Rollout:
    """The same rollout, of whose tokens an environment wrote one in the middle, if it has three."""
    if len(rollout.tokens) < 3:
        return rollout
    versions = np.array([rollout.versions[0], OBSERVED, rollout.versions[-1]], np.int32)
    logprobs = rollout.logprobs.copy()
    logprobs[1] = 0
    return replace(
        rollout,
        versions=versions,
        digests=np.zeros_like(versions, np.int64),
        ends=np.array([1, 2, len(rollout.tokens)], np.int32),
        logprobs=logprobs,
    )


def printed(sample: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(render(sample, chars=0))
    return console.export_text()


def run_of(folder: Path, **learner: Any) -> Run:
    return replace(
        SETTINGS, name="run", out=str(folder), learner=Learner(problems_per_step=4, row_tokens=40, **learner)
    )


def test_a_line_has_the_problem_and_every_rollout_as_text(tmp_path: Path) -> None:
    run = run_of(tmp_path, samples=4)
    stepper, shard = trained(run)
    samples = Samples.start(run, resume_from=0)
    samples.keep([shard], stepper.statistics)
    samples.close()
    lines = read_samples(tmp_path / "run")
    assert sorted(line["task"] for line in lines) == [0, 1, 2, 3]
    tokenizer, source = load_tokenizer(model_folder(run.model.path)), source_of(run)
    for line in lines:
        assert (line["step"], line["version"]) == (1, 5)
        problem = source.training(line["task"])
        assert (line["problem"], line["answer"], line["strategy"]) == (
            problem.problem,
            problem.answer,
            problem.strategy,
        )
        rollouts = [rollout for rollout in shard.rollouts if rollout.task == line["task"]]
        for written, rollout in zip(line["rollouts"], rollouts, strict=True):
            assert written["text"] == decode(tokenizer, rollout.tokens)
            assert (written["slot"], written["guided"], written["reward"]) == (
                rollout.slot,
                rollout.guided,
                rollout.reward,
            )
            assert written["correct"] == (rollout.reward > 0)
            assert (written["versions"], written["ends"]) == (rollout.versions.tolist(), rollout.ends.tolist())
            assert written["tokens"] == len(rollout.tokens) and written["finish"] == "stop"
            if "kl" in written:
                assert len(written["kl"]) == len(written["pieces"]) == len(rollout.tokens)
                assert "".join(written["pieces"]) == written["text"]
    assert any("kl" in rollout for line in lines for rollout in line["rollouts"])


def test_tokens_of_an_environment_have_no_divergence(tmp_path: Path) -> None:
    """Spans of the version OBSERVED are read and not trained."""
    run = run_of(tmp_path, samples=4)
    stepper = cases.stepper(run, cases.tiny_model())
    groups = [[observed(rollout) for rollout in group] for group in cases.groups()]
    shard = cases.shard_of(groups, problems=4)
    stepper.update(shard)
    samples = Samples.start(run, resume_from=0)
    samples.keep([shard], stepper.statistics)
    samples.close()
    found = 0
    for line in read_samples(tmp_path / "run"):
        for written, rollout in zip(line["rollouts"], groups[line["task"]], strict=True):
            assert len(written["versions"]) == len(rollout.versions) and "-1" not in versions_of(written)
            if "kl" in written:
                assert [kl is not None for kl in written["kl"]] == rollout.sampled.tolist()
                assert set(np.flatnonzero(~rollout.sampled)) <= set(written["left_out"])
                found += None in written["kl"]
                assert "nats: mean" in printed(line)
    assert found


def above(d: np.ndarray, bound: float) -> list[int]:
    return np.flatnonzero(d > bound).tolist()


def outside(rollout: Rollout, bound: float) -> list[int]:
    """The tokens whose ratio of the teacher to the policy that sampled them is outside [1/bound, bound]."""
    log_teacher = cases.log_probs(cases.tiny_model(), rollout.prompt, rollout.tokens).detach().numpy()
    sampled = log_teacher[np.arange(len(rollout.tokens)), rollout.tokens]
    return above(np.abs(sampled - rollout.logprobs), np.log(bound))


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ({"limiter": "mask", "delta": 1.0}, lambda _, d: above(d, 1.0)),
        ({"limiter": "quantile", "quantile": 0.5}, lambda _, d: above(d, np.quantile(d, 0.5))),
        ({"kl_correction": Correction(mode="token-mask", bound=1.2)}, lambda rollout, _: outside(rollout, 1.2)),
        ({"distil_skip": 2}, lambda *_: [0, 1]),
        ({"limiter": "clamp", "delta": 0.1}, lambda *_: []),
    ],
)
def test_the_tokens_without_a_part_in_the_loss_are_written(
    algorithm: dict[str, Any], expected: Callable[[Rollout, np.ndarray], list[int]]
) -> None:
    plain = {"kl_correction": Correction(mode="none", bound=1.0), "distil_skip": 0, "limiter": "none"}
    stepper, shard = trained(cases.settings(**(plain | algorithm)))
    assert stepper.statistics is not None
    _, kl = chosen([shard], stepper.statistics, 4, seed=0)
    rollouts = [rollout for rollout in shard.rollouts if (rollout.task, rollout.slot) in kl]
    found = [np.flatnonzero(kl[rollout.task, rollout.slot].left_out).tolist() for rollout in rollouts]
    assert found == [expected(rollout, kl[rollout.task, rollout.slot].d) for rollout in rollouts]
    assert len(found) == 3 and any(found) == (algorithm.get("limiter") != "clamp")
    assert sum(map(len, found)) < sum(len(rollout.tokens) for rollout in rollouts)


def after_sibling(autonomous: Sequence[Rollout]) -> dict[int, InContext]:
    """The teacher reads every rollout but the third after the completion of the first one or, there, of the last."""
    found = cases.right_contexts(autonomous)
    return {slot: replace(one, sibling=0 if slot else autonomous[-1].slot) for slot, one in found.items()}


@pytest.mark.parametrize("objective", ["sdpo", "iw-opd", "rlsd", "opsd"])
def test_the_sibling_with_which_the_teacher_reads_a_rollout_is_written(tmp_path: Path, objective: str) -> None:
    wrong = {"distilled": "wrong"} if objective == "opsd" else {}
    rule = Correction(mode="none", bound=1.0)
    run = run_of(tmp_path, samples=4)
    run = replace(run, algorithm=cases.settings(objective=objective, kl_correction=rule, **wrong).algorithm)
    stepper = cases.stepper(run, cases.tiny_model())
    stepper.contexts = after_sibling  # type: ignore[assignment]
    shard = cases.shard_of(cases.groups(), problems=4)
    stepper.update(shard)
    samples = Samples.start(run, resume_from=0)
    samples.keep([shard], stepper.statistics)
    samples.close()
    lines = read_samples(tmp_path / "run")
    for line in lines:
        last = max(one["slot"] for one in line["rollouts"] if not one["guided"])
        for one in line["rollouts"]:
            if "sibling" in one:
                assert not one["guided"] and one["slot"] != 2
                assert one["sibling"] == (0 if one["slot"] else last)
                assert sibling_note(one, line) and "context of the teacher" in printed(line)
            if objective in ("sdpo", "opsd"):
                assert ("sibling" in one) == ("kl" in one), "of a rollout that is not distilled, none was read"
    assert any("sibling" in one for line in lines for one in line["rollouts"])


def test_without_samples_nothing_is_written(tmp_path: Path) -> None:
    run = run_of(tmp_path, samples=0)
    stepper, shard = trained(run)
    samples = Samples.start(run, resume_from=0)
    samples.keep([shard], stepper.statistics)
    samples.close()
    assert read_samples(tmp_path / "run") == []


def test_problems_that_the_learner_cannot_read_are_replaced_by_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_of(tmp_path, samples=1)
    stepper, shard = trained(run)
    run = replace(run, tasks=replace(run.tasks, source="file", path=str(tmp_path / "missing.jsonl")))
    samples = Samples.start(run, resume_from=0)
    samples.keep([shard], stepper.statistics)
    samples.close()
    assert "samples.jsonl will have prompts in place of problems" in caplog.text and "missing.jsonl" in caplog.text
    (line,) = read_samples(tmp_path / "run")
    prompt = next(rollout.prompt for rollout in shard.rollouts if rollout.task == line["task"])
    assert line["problem"] == decode(load_tokenizer(model_folder(run.model.path)), prompt)
    assert line["strategy"] is None


@pytest.mark.parametrize("objective", ["grpo", "sft", "luffy", "hpt"])
def test_objectives_without_distillation_have_samples_without_divergences(tmp_path: Path, objective: str) -> None:
    run = replace(run_of(tmp_path, samples=4), algorithm=replace(SETTINGS.algorithm, objective=objective))
    stepper, shard = trained(run)
    samples = Samples.start(run, resume_from=0)
    samples.keep([shard], stepper.statistics)
    samples.close()
    lines = read_samples(tmp_path / "run")
    assert len(lines) == 4
    assert all(line["alpha"] == 0 and "kl" not in rollout for line in lines for rollout in line["rollouts"])


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level tokenizer without merges: each byte of a character is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytes")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def metaspace_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer that, like Llama 2's, drops the space at the beginning of what it decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {piece: i for i, piece in enumerate(["▁", "▁a", "▁b", "a", "b", "▁▁"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="▁"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    folder = tmp_path_factory.mktemp("metaspace")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ["plain", "né", "漢字", "🙂 ok 👩‍🚀", "a\n\tb  c", "𝔸" * 40])
def test_the_pieces_of_a_text_are_whole_characters(byte_tokenizer: Any, text: str) -> None:
    tokens = np.array(byte_tokenizer.encode(text), np.int32)
    assert len(tokens) == len(text.encode())
    found = pieces(byte_tokenizer, tokens)
    assert len(found) == len(tokens)
    assert "".join(found) == text and "\ufffd" not in "".join(found)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_completion_may_end_within_a_character(byte_tokenizer: Any, cut: int) -> None:
    tokens = np.array(byte_tokenizer.encode("ab🙂"), np.int32)[:-cut]
    found = pieces(byte_tokenizer, tokens)
    assert len(found) == len(tokens) and "".join(found) == decode(byte_tokenizer, tokens)


@pytest.mark.parametrize("ids", [[1, 2, 1], [3, 1, 2], [0, 1], [5, 1, 4, 2], [2, 0, 2]])
def test_the_pieces_keep_the_spaces_between_words(metaspace_tokenizer: Any, ids: list[int]) -> None:
    tokens = np.array(ids, np.int32)
    assert "".join(pieces(metaspace_tokenizer, tokens)) == decode(metaspace_tokenizer, tokens)
    assert decode(metaspace_tokenizer, np.array([1, 2])) == "a b"


def test_keeping_samples_does_not_change_the_step() -> None:
    """The divergences are copies: the parameters after the step do not depend on who reads them."""
    first, shard = trained()
    second, _ = trained()
    assert first.statistics is not None
    chosen([shard], first.statistics, 4, seed=0)
    assert first.update(shard) == second.update(shard)
    own, other = (list(stepper.policy.parameters()) for stepper in (first, second))
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(own, other, strict=True))  # type: ignore[attr-defined]
