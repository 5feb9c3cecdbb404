"""Trains again on the rollouts of a finished run, without engine, hub and actors, and compares with the run's policy.

    docs/results/smollm2/replay.py runs/NAME

The run must have kept all of its groups (`learner.samples` = `learner.problems_per_step`). Behaviour log-probabilities
are computed here, by the learner's own weights of the version that sampled each token. So if the result is the run's
policy, the engine had exactly the learner's weights, reported the right log-probabilities, and nothing was lost or
mixed up on the way: whatever the run learned, it learned from its rollouts.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from sgpo_async.config import load
from sgpo_async.learner import optimiser
from sgpo_async.learner.packing import Tokens, pack
from sgpo_async.learner.policy import Policy, shard
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.teacher import Teacher
from sgpo_async.model.folder import load_tokenizer
from sgpo_async.model.load import load_model
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.wire.records import Rollout, Shard

FIGURES = ("loss", "grpo_loss", "kd_loss", "grad_norm", "entropy")
Key = tuple[int, int]  # task and slot


class Replay:
    """A learner of one rank, and the rollouts of a run."""

    def __init__(self, folder: Path) -> None:
        self.run = run = load(folder / "config.yaml")
        self._tokenizer = load_tokenizer(run.model.path)
        self.groups = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        self._log_mu: dict[Key, np.ndarray] = {}
        mesh = init_device_mesh("cpu", (1,))
        policy, frozen = (Policy(load_model(run.model.path, device="cpu", dtype="float32")) for _ in range(2))
        shard(policy, mesh, precision="float32")
        teacher = shard(frozen.requires_grad_(False), mesh, precision="float32")
        own = optimiser.build(policy, run.optim)
        self.stepper = Stepper(run, policy, own, Teacher(run.algorithm, teacher if run.copies_teacher else None))

    def step(self, number: int) -> dict[str, Any]:
        """Train on the groups of this step, and return its metrics. The policy has version `number` - 1 before."""
        self._behave(number - 1)
        groups = [group for group in self.groups if group["step"] == number]
        rollouts = tuple(self._rollout(group, line) for group in groups for line in group["rollouts"])
        return self.stepper.update(Shard(step=number - 1, version=number - 1, problems=len(groups), rollouts=rollouts))

    def distance(self, other: Path) -> tuple[float, float]:
        """The norm of the difference to the policy in this folder, and its largest element."""
        parameters = dict(load_model(str(other), device="cpu", dtype="float32").named_parameters())
        ours = {name: p.full_tensor() for name, p in self.stepper.policy.model.named_parameters()}
        difference = torch.cat([(ours[name] - parameters[name]).flatten() for name in ours]).detach()
        return float(difference.norm()), float(difference.abs().max())

    def _behave(self, version: int) -> None:
        """Compute the log-probabilities of all tokens that this version sampled."""
        for group in self.groups:
            lines = [line for line in group["rollouts"] if version in line["versions"]]
            sequences = [Tokens(self._prompt(group, line), self._tokens(line)) for line in lines]
            found = self.stepper.policy.log_probabilities(pack(sequences), self.run.rollout.temperature)
            parts = found.split([len(own.completion) for own in sequences])
            for line, own in zip(lines, parts if lines else (), strict=True):
                log_mu = self._log_mu.setdefault((group["task"], line["slot"]), np.zeros(len(own), np.float32))
                sampled = np.repeat(line["versions"], np.diff(line["ends"], prepend=0)) == version
                log_mu[sampled] = own.numpy()[sampled]

    def _rollout(self, group: dict[str, Any], line: dict[str, Any]) -> Rollout:
        """The target o+ is the rollout whose divergences the run has kept; its score (Eq. 4) is made the highest."""
        may_be_distilled = line["guided"] and line["correct"] and line["finish"] == "stop"
        return Rollout(
            task=group["task"],
            attempt=0,
            slot=line["slot"],
            purpose="train",
            guided=line["guided"],
            prompt=self._prompt(group, line),
            tokens=self._tokens(line),
            logprobs=self._log_mu[group["task"], line["slot"]],
            versions=np.array(line["versions"], np.int32),
            digests=np.zeros(len(line["versions"]), np.int64),
            ends=np.array(line["ends"], np.int32),
            reward=line["reward"],
            finish=line["finish"],
            unguided_logprob=(-1.0 if "kl" in line else -2.0) if may_be_distilled else None,
        )

    def _prompt(self, group: dict[str, Any], line: dict[str, Any]) -> np.ndarray:
        strategy = group["strategy"] if line["guided"] else None
        ids = build_prompt(group["problem"], strategy, tasks=self.run.tasks, tokenizer=self._tokenizer)
        return np.array(ids, np.int32)

    def _tokens(self, line: dict[str, Any]) -> np.ndarray:
        ids = self._tokenizer.encode(line["text"], add_special_tokens=False)
        if len(ids) != line["tokens"]:
            sys.exit(f"error: {line['text']!r} has other tokens than when it was sampled; replay another run")
        return np.array(ids, np.int32)


def main() -> None:
    """Replay the run, and print its figures beside those of the replay."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo")
    replay = Replay(folder)
    run = {line["step"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    before = replay.distance(folder / "policy")
    print(f"{'step':>4} {'':>7}", *(f"{name:>11}" for name in FIGURES))
    for number, _ in groupby(replay.groups, key=lambda group: group["step"]):
        for who, figures in (("run", run[number]), ("replay", replay.step(number))):
            print(f"{number:>4} {who:>7}", *(f"{figures[name]:>11.7f}" for name in FIGURES), flush=True)
    after = replay.distance(folder / "policy")
    print(f"distance from the run's policy, norm (largest): {after[0]:.1e} ({after[1]:.1e}); ", end="")
    print(f"before the steps: {before[0]:.1e} ({before[1]:.1e})")


if __name__ == "__main__":
    main()
