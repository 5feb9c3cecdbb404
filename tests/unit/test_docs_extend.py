"""The examples of docs/extend.md run and do what the page says."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgpo_async.config.schema import Algorithm, Tasks
from sgpo_async.engines import Generate, Generated, SampledTokens, Weights
from sgpo_async.engines.sglang.weight_sync.transports import Prepared
from sgpo_async.learner.objectives import OBJECTIVES
from sgpo_async.learner.objectives.base import TaskGroup
from sgpo_async.model.canary import canary_of
from sgpo_async.rollout.sampler import RolloutSampler, Sampled
from sgpo_async.tasks import verify
from sgpo_async.weights import digest
from sgpo_async.weights.short_digest import short_digest
from tests.reference import learner_cases as cases
from tests.unit.rollout_support import TOKENIZER, lease

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def run(title: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a section's code and return the names that it defines; the registries are restored after the test."""
    monkeypatch.setattr(verify, "VERIFIERS", dict(verify.VERIFIERS))
    monkeypatch.setitem(OBJECTIVES, "maxrl", OBJECTIVES["grpo"])
    (body,) = [body for name, body in SECTIONS if name == title]
    names: dict[str, Any] = {"__name__": "extend"}
    for block in re.findall(r"^```python\n(.*?)^```", body, re.M | re.S):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_example_objective_computes_its_advantages(monkeypatch: pytest.MonkeyPatch) -> None:
    run("An objective", monkeypatch)
    rollouts = cases.groups()[0]
    autonomous = tuple(rollout for rollout in rollouts if not rollout.guided)
    group = TaskGroup(autonomous=autonomous, guided=(), problems=4)
    rewards = np.array([rollout.reward for rollout in autonomous])
    trained = OBJECTIVES["maxrl"](group, Algorithm(objective="grpo"))
    found = [term.advantage for term in trained.policy_gradient]
    assert found == pytest.approx(list((rewards - rewards.mean()) / rewards.mean()) if rewards.any() else [0.0] * 4)
    assert {term.weight for term in trained.policy_gradient} == {1 / 16}


def test_the_example_verifier_judges_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    run("A verifier", monkeypatch)
    judge = verify.VERIFIERS["word"]
    assert judge("blue", "The answer is Blue.")
    assert not judge("blue", "blue or red")
    assert not judge("blue", "")


def test_the_example_engine_serves_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Used directly, and in the rollout loop of actors."""
    engine = run("An engine", monkeypatch)["EchoEngine"]()
    weights = Weights(version=3, digest=digest({}.items()), read=dict)
    engine.watch(canary_of(TOKENIZER), every_s=1.0)
    engine.load(weights)
    assert [scored.digest for scored in engine.canaries()] == [engine.digest] == [short_digest(weights.digest)]
    prompt = np.arange(10, dtype=np.int32)
    engine.submit(Generate(id="a", prompt=prompt, max_new_tokens=4, temperature=1.0, seed=0))
    (result,) = engine.step(0.0)
    assert isinstance(result, Generated)
    assert (result.tokens.tolist(), result.versions.tolist(), result.ends.tolist()) == ([6, 7, 8, 9], [3], [4])
    engine.load(replace(weights, version=4))
    beginning = SampledTokens(
        tokens=np.array([1, 2], np.int32), logprobs=-np.ones(2, np.float32), versions=result.versions,
        digests=result.digests,
        ends=np.array([2], np.int32),
    )  # fmt: skip
    engine.submit(Generate(id="b", prompt=prompt, max_new_tokens=4, temperature=1.0, seed=0, prefix=beginning))
    assert engine.progress(["a", "b"]) == {"b": beginning}
    (result,) = engine.step(0.0)
    assert isinstance(result, Generated) and engine.progress(["b"]) == {}
    assert (result.tokens.tolist(), result.versions.tolist(), result.ends.tolist()) == ([1, 2, 8, 9], [3, 4], [2, 4])
    sampler = RolloutSampler(engine, TOKENIZER, Tasks())
    sampler.add(lease(7))
    outcomes = sampler.step(0.0)
    assert [outcome.text for outcome in outcomes if isinstance(outcome, Sampled)] == ["blem", "blem"]
    sampler.close()


async def _sent(transport: Any, prepared: Prepared) -> list[Any]:
    sent: list[Any] = []

    class Api:
        async def post(self, path: str, body: Any, *, timeout_s: float) -> None:
            sent.append((path, body))

    await transport.send(Api(), prepared, flush=True, timeout_s=1.0)
    return sent


def test_the_example_weight_transport_sends_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    class Model:
        def read(self, weights: Weights) -> Any:
            return weights.read()

        def expected(self, tensors: Any) -> list[Any]:
            return [{"checksum": str(len(tensors))}]

    transport = run("A weight transport", monkeypatch)["ReplicatedFolder"](Model(), "/weights")
    prepared = transport.prepare(Weights(version=5, digest="", read=lambda: {"a": 1, "b": 2}))  # type: ignore[dict-item]
    assert (prepared.version, prepared.expected) == (5, [{"checksum": "2"}])
    body = {"model_path": "/weights/5", "flush_cache": True}
    assert asyncio.run(_sent(transport, prepared)) == [("/update_weights_from_disk", body)]
