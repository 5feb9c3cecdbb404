"""Supervised warm-up on one rank: its loss, the order of its problems, its data and its export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sgpo_async.config.schema import WARMUP_CHECKPOINTS, Algorithm, Learner, Model, Run, Sft, Tasks
from sgpo_async.errors import ConfigError, DataError
from sgpo_async.learner import sft as sft_module
from sgpo_async.learner.checkpoint import CheckpointWriter
from sgpo_async.learner.packing import Tokens
from sgpo_async.learner.process_group import join_alone
from sgpo_async.learner.sft import Examples, WarmUp, supervised
from sgpo_async.model.folder import model_folder
from sgpo_async.tasks.sft_data import sft_data
from sgpo_async.tasks.sources import source_of
from tests.reference import learner_cases as cases

pytestmark = pytest.mark.usefixtures("one_rank")


def examples(count: int, seed: int = 0) -> list[Tokens]:
    rng = np.random.default_rng(seed)

    def draw() -> np.ndarray:
        return rng.integers(0, cases.VOCABULARY, rng.integers(1, 9)).astype(np.int32)

    return [Tokens(draw(), draw()) for _ in range(count)]


def warm_up(monkeypatch: pytest.MonkeyPatch, folder: Path, *, row_tokens: int = 40, **sft: Any) -> WarmUp:
    """A warm-up of the tiny float64 model on random examples."""
    monkeypatch.setattr(sft_module, "build", lambda run, _mesh: (cases.stepper(run, cases.tiny_model()), ""))
    run = Run(
        out=str(folder),
        learner=Learner(row_tokens=row_tokens, trackers=[]),  # a tracker is a process
        sft=Sft(**({"batch": 5, "epochs": 3, "lr": 1e-2} | sft)),
    )
    mesh = join_alone()
    writer = CheckpointWriter(Path(run.folder) / WARMUP_CHECKPOINTS, keep=1)
    return WarmUp(run, mesh, Examples(examples(12), examples(4, seed=1), {}), writer)


def reference_loss(model: Any, sequences: list[Tokens]) -> torch.Tensor:
    """The token mean of -log pi(y_t|q,y_<t) over all sequences, computed with one forward per sequence."""
    picked = [
        cases.log_probs(model, one.prompt, one.completion)[range(len(one.completion)), one.completion.tolist()]
        for one in sequences
    ]
    return -torch.cat(picked).sum() / sum(len(one.completion) for one in sequences)


@pytest.mark.parametrize("row_tokens", [1, 12, 40, 10_000])
def test_batch_loss_and_gradient_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, row_tokens: int
) -> None:
    warm = warm_up(monkeypatch, tmp_path, row_tokens=row_tokens)
    loss = warm.stepper.accumulate(warm.batch(0)).reduce()["loss"]
    model = cases.tiny_model()
    expected = reference_loss(model, [warm.examples.training[i] for i in warm._order(0)])
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-10)
    for name, parameter in warm.stepper.policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), model.get_parameter(name).grad, atol=1e-10, rtol=1e-9)


def test_the_validation_loss_is_the_token_mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    warm = warm_up(monkeypatch, tmp_path, row_tokens=12)
    with torch.no_grad():
        expected = reference_loss(cases.tiny_model(), list(warm.examples.validation)).item()
    assert warm.validation_loss() == pytest.approx(expected, abs=1e-10)


def test_each_epoch_uses_each_problem_once_in_a_new_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    warm = warm_up(monkeypatch, tmp_path)
    assert (warm.per_epoch, warm.run.steps) == (3, 9)
    epochs = [[i for step in range(3 * epoch, 3 * epoch + 3) for i in warm._order(step)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(warm._order(step)) for step in range(3)] == [5, 5, 2]  # the last batch of an epoch is smaller


def test_a_warm_up_does_not_resume_with_other_adapters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    warm = warm_up(monkeypatch, tmp_path, epochs=1)
    warm.state.lora = {"rank": 4, "alpha": 32.0, "targets": []}
    warm._checkpoint()
    warm.checkpoints.wait()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ConfigError, match=r"learner\.lora\.rank must be 4, as in .*step-00000000, got 0"):
        warm_up(monkeypatch, tmp_path, epochs=1)


def test_the_best_policy_is_exported_not_the_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    exported: list[int] = []

    def export(_model: Any, tensors: dict[str, torch.Tensor], folder: Path, **_: Any) -> None:
        exported.append(len(tensors))
        folder.mkdir()
        (folder / str(len(exported))).touch()

    monkeypatch.setattr(sft_module, "export", export)
    warm = warm_up(monkeypatch, tmp_path)
    losses = iter([0.5, 0.3, 0.4])
    monkeypatch.setattr(warm, "validation_loss", lambda: next(losses))
    warm.train()
    assert (warm.state.best_loss, warm.state.best_step) == (0.3, 6)
    assert len(exported) == 2
    assert [file.name for file in (tmp_path / "run" / "warmup").iterdir()] == ["2"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("validation_loss") for line in lines] == [None, None, 0.5, None, None, 0.3, None, None, 0.4]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_step"] == 6


def test_learning_rate_and_schedule_come_from_the_sft_settings(tmp_path: Path) -> None:
    run = supervised(Run(out=str(tmp_path), sft=Sft(lr=2e-3, warmup_ratio=0.25, schedule="linear")), steps=30)
    assert (run.steps, run.optim.lr, run.optim.warmup_steps, run.optim.schedule) == (30, 2e-3, 8, "linear")
    assert not run.algorithm.copies_teacher


@pytest.mark.parametrize("keys", [{"policy_gradient": False}, {"pass_rates": "corrected"}, {"objective": "luffy"}])
def test_the_warm_up_of_any_objective_needs_no_demonstrations(keys: dict[str, Any]) -> None:
    run = Run(algorithm=Algorithm(**keys))
    assert not supervised(run, steps=3).algorithm.needs_responses


def file_run(path: Path, rows: list[dict[str, Any]], **sft: Any) -> Run:
    """A run whose warm-up reads the file at `path`, while the run itself reads another file."""
    path.write_text("\n".join(json.dumps({"answer": "1"} | row) for row in rows), encoding="utf-8")
    tasks = Tasks(source="file", path=str(path.with_name("rl.jsonl")))
    return Run(model=Model(path="builtin:cues"), tasks=tasks, sft=Sft(path=str(path), **sft))


def test_problems_without_a_response_or_with_too_many_tokens_are_counted_and_left_out(tmp_path: Path) -> None:
    rows = [{"problem": f"problem 1 amber from {i} 0", "response": "1 amber raise 0 1"} for i in range(10)]
    rows += [{"problem": "problem 2 amber from 0 0"}, {"problem": "x", "response": "1 amber " * 30}]
    found = Examples.read(file_run(tmp_path / "p.jsonl", rows, max_tokens=20, validation_share=0.2))
    assert found.counts["training"] + found.counts["validation"] == 10
    assert (found.counts["too_long"], found.counts["without_response"]) == (1, 1)
    assert {len(tokens.completion) for tokens in found.training} == {6}  # five words and the end token


def test_the_guided_share_of_the_prompts_holds_the_strategy(tmp_path: Path) -> None:
    """Which problems these are depends on the seed; a problem without a strategy keeps its plain prompt."""
    given = {"strategy": "amber raise", "response": "1"}
    rows = [{"problem": f"problem 1 amber from {i % 10} {i // 10}"} | given for i in range(100)]
    rows += [{"problem": f"problem 2 amber from {i} 0", "response": "1"} for i in range(10)]

    def guided(share: float, seed: int = 0) -> set[tuple[int, ...]]:
        run = replace(file_run(tmp_path / "p.jsonl", rows, guided_share=share), seed=seed)
        found = Examples.read(run)
        prompts = [tuple(tokens.prompt.tolist()) for tokens in (*found.training, *found.validation)]
        shortest = min(map(len, prompts))
        return {prompt for prompt in prompts if len(prompt) > shortest}

    assert (len(guided(0)), len(guided(1))) == (0, 100)
    assert 35 <= len(guided(0.5)) <= 65
    assert guided(0.5) == guided(0.5) != guided(0.5, seed=1)
    assert guided(0.5) < guided(1)


@pytest.mark.parametrize("positions", [{"max_position_embeddings": 24}, {"sliding_window": 8}])
def test_problems_beyond_the_positions_of_the_model_are_counted_and_left_out(
    tmp_path: Path, positions: dict[str, int]
) -> None:
    """A sliding window does not limit the positions of a trained sequence."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("builtin:cues"), folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | positions
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    room = config["max_position_embeddings"]
    rows = [{"problem": f"problem 1 amber from {i} 0", "response": "amber " * words} for i in range(9)
            for words in (room - 7, room - 6)]  # fmt: skip
    run = replace(file_run(tmp_path / "p.jsonl", rows), model=Model(path=str(folder)))
    found = Examples.read(run)
    assert (found.counts["training"] + found.counts["validation"], found.counts["too_long"]) == (9, 9)
    assert {len(tokens.prompt) + len(tokens.completion) for tokens in found.training} == {room}
    with pytest.raises(DataError, match=rf"model\.path: every problem .* longer than {room} tokens .*{room} positions"):
        Examples.read(replace(file_run(tmp_path / "p.jsonl", rows[1::2]), model=Model(path=str(folder))))


def test_training_and_validation_share_no_text_even_if_problems_occur_twice(tmp_path: Path) -> None:
    rows = [{"problem": f"problem {i % 7}", "response": f"response {i}"} for i in range(28)]
    run = file_run(tmp_path / "p.jsonl", rows, validation_share=0.3)
    found = sft_data(run)
    assert not {p.problem for p in found.training} & {p.problem for p in found.validation}
    assert len(found.training) + len(found.validation) == 28
    assert sft_data(run) == found
    assert sft_data(replace(run, seed=5)) != found


def test_problems_of_the_validation_file_are_never_trained_on(tmp_path: Path) -> None:
    rows = [{"problem": f"problem {i}", "response": "r"} for i in range(6)]
    validation = tmp_path / "validation.jsonl"
    file_run(validation, rows[:2])
    found = sft_data(file_run(tmp_path / "p.jsonl", rows, validation=str(validation)))
    assert [p.problem for p in found.validation] == ["problem 0", "problem 1"]
    assert [p.problem for p in found.training] == [f"problem {i}" for i in range(2, 6)]


@pytest.mark.parametrize("rows", [[{"problem": "a"}, {"problem": "b"}], [{"problem": "a", "response": "r"}]])
def test_the_error_for_too_few_problems_is_one_line(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="at least one of each") as caught:
        sft_data(file_run(tmp_path / "p.jsonl", rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sft_path", ["", "p.jsonl", "../data/p.jsonl"])
def test_the_warm_up_excludes_the_held_out_problems_of_the_run(tmp_path: Path, sft_path: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"problem": f"problem {i} amber from 0 0", "response": "1 amber raise 0 1"} for i in range(50)]
    run = file_run(folder / "p.jsonl", rows * 2)
    tasks = replace(run.tasks, path=str(folder / "p.jsonl"), held_out=20)
    settings = {"tasks": tasks, "sft": Sft(path=sft_path and str(folder / sft_path))}
    run = replace(run, algorithm=Algorithm(objective="grpo"), **settings)
    found = sft_data(run)
    texts = {p.problem for part in found[:2] for p in part}
    assert len(texts) == 30
    assert not texts & {p.problem for p in source_of(run).held_out()}
    assert found.held_out == Examples.read(run).counts["held_out"] == 40


def test_a_separate_sft_file_is_used_completely(tmp_path: Path) -> None:
    rows = [{"problem": f"problem {i}", "response": "r"} for i in range(10)]
    run = file_run(tmp_path / "sft.jsonl", rows)
    file_run(tmp_path / "rl.jsonl", rows)
    found = sft_data(replace(run, tasks=replace(run.tasks, held_out=5)))
    assert len(found.training) + len(found.validation) == 10
    assert found.held_out == 0


def test_the_built_in_domain_provides_problems_with_responses() -> None:
    run = Run(sft=Sft(problems=50))
    found = sft_data(run)
    assert len(found.training) + len(found.validation) == 50
    assert all(p.response for p in [*found.training, *found.validation])
