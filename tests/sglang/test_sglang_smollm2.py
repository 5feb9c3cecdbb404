"""A real language model in a real server: chat prompts, its own end token, log-probabilities, an update, and a run."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_support import ROOT, assert_all_trained, real_run
from sglang_support import PYTHON, Servers, assert_teacher_forced
from smollm2_support import END, converted, embedded, weights_of

from examples import word_problems
from sgpo_async.config import load
from sgpo_async.engines import Generate, Generated, Score, Scored
from sgpo_async.engines.sglang.processes.launch import CPU_CACHE
from sgpo_async.model.folder import load_tokenizer
from sgpo_async.model.load import load_model
from sgpo_async.tasks.prompts import build_prompt

pytestmark = [pytest.mark.sglang, pytest.mark.process]
QUESTIONS = (("What is the capital of France?", "Name the city on the Seine."), ("What is 5 + 1?", "Count on from 5."))
SLOTS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    logs = tmp_path_factory.mktemp("logs")
    with Servers(folder, logs, servers=1, slots=SLOTS, start_timeout_s=300.0, phase_timeout_s=120.0) as servers:
        yield servers


def requests_for(folder: Path, *, first: int) -> list[Generate]:
    """Four completions of each prompt, without and with its strategy; their ids begin at `first`."""
    tasks, tokenizer = load(ROOT / "configs" / "smollm2.yaml", []).tasks, load_tokenizer(str(folder))
    prompts = [
        np.array(build_prompt(problem, used, tasks=tasks, tokenizer=tokenizer), np.int32)
        for problem, strategy in QUESTIONS
        for used in (None, strategy)
    ]
    return [
        Generate(id=id, prompt=prompts[id % len(prompts)], max_new_tokens=16, temperature=1.0, seed=id)
        for id in range(first, first + SLOTS)
    ]


def assert_engines_agree(
    model: Any, version: int, folder: Path, requests: Sequence[Generate], results: dict[Any, Any]
) -> None:
    """The embedded engine and one forward pass in float64 give the sampled tokens the log-probabilities of SGLang."""
    assert_teacher_forced({version: model}, requests, results)
    engine = embedded(str(folder))
    engine.load(weights_of(model, version=version))
    for one in requests:
        engine.submit(Score(id=one.id, prompt=one.prompt, tokens=results[one.id].tokens, temperature=1.0))
    scored: list[Scored] = []
    while len(scored) < len(requests):
        scored += [one for one in engine.step(0.0) if isinstance(one, Scored)]
    for one in scored:
        np.testing.assert_allclose(one.logprobs, results[one.id].logprobs, atol=1e-4)


def test_the_server_samples_and_scores_as_the_embedded_engine_does_before_and_after_an_update(
    server: Servers, folder: Path
) -> None:
    old: Any = load_model(str(folder), device="cpu", dtype="float32")
    new = copy.deepcopy(old)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in new.parameters():  # also the one matrix that is embedding and head
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    for version, model in enumerate((old, new)):
        server.engine.load(weights_of(model, version=version))
        server.until(lambda version=version: server.versions() == {version}, f"version {version}", seconds=300)  # type: ignore[misc]
        requests = requests_for(folder, first=100 * version)
        for one in requests:
            server.engine.submit(one)
        results = server.results(len(requests), seconds=300)
        assert_engines_agree(model, version, folder, requests, results)
        ended = [one for one in results.values() if isinstance(one, Generated) and one.finish == "stop"]
        assert ended and all(one.tokens[-1] == END and END not in one.tokens[:-1] for one in ended)
    assert {update.transport for update in server.engine.updates} == {"disk"} and not server.events()


def test_the_server_takes_a_limited_part_of_the_machine_s_memory(server: Servers) -> None:
    """SGLang allocates the whole cache at the start: 6 GB, if it is limited by the number of tokens only."""
    used = max(process.memory_info().rss for process in server.processes(0) if process.is_running())
    assert used < CPU_CACHE + 3 * 2**30, f"{used / 2**30:.1f} GiB"  # beside it: the model, an update, and libraries


@pytest.mark.slow  # minutes: server, learner and actor load the model; the test above compares the same values
def test_a_step_of_a_run(tmp_path: Path, folder: Path) -> None:
    word_problems.write(tmp_path / "problems", count=16, warm_up=8, seed=0)
    small = ["steps=1", "learner.problems_per_step=1", "rollout.autonomous=3", "rollout.guided=1"]
    small += ["rollout.max_new_tokens=6", "tasks.held_out=1", "algorithm.objective=luffy", f"model.path={folder}"]
    small += [f"tasks.path={tmp_path / 'problems' / 'problems.jsonl'}", f"engine.sglang.python={PYTHON}"]
    both = [str(ROOT / "configs" / "smollm2-sglang.yaml"), *small]
    with real_run(tmp_path / "run", *both, base="configs/smollm2.yaml") as run:
        local = run.local()
        assert local.wait(550) == 0, local.output
        run.assert_cleaned_up()
        assert_all_trained(run.summary()["ledger"], tasks=1, size=4)
        (line,) = run.metrics()
        assert line["grad_norm"] > 0 and line["mismatch_max_lag0_first"] < 1e-3
        for large in ("policy", "checkpoints"):
            shutil.rmtree(run.folder / large)
