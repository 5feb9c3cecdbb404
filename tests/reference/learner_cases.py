"""Training shards, tiny models and learners for the tests of the learner."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from sgpo_async.config.schema import Algorithm, Correction, Hub, Learner, Local, Optim, Run
from sgpo_async.config.schema import Rollout as Sizes
from sgpo_async.learner import optimiser
from sgpo_async.learner.contexts import InContext
from sgpo_async.learner.policy import Policy, shard
from sgpo_async.learner.step import Stepper
from sgpo_async.learner.teacher import Teacher
from sgpo_async.wire.records import OBSERVED, Rollout, Shard

VOCABULARY = 13
VERSION = 5  # of the weights that are trained
START = 7  # the seed of the model at the start of the run, for `reference_kl`
TOP = 3  # number of most likely tokens reported with each token of a correct guided rollout
PAPER: dict[str, Any] = {  # the setting of the paper, with the prefix correction towards the self-teacher
    "teacher": "self",
    "limiter": "mask",
    "alpha0": 0.5,
    "alpha_max": 0.8,
    "teacher_temperature": 1.0,
    "distil_skip": 0,
    "kl_correction": Correction(mode="prefix", bound=1.0),
}


def tiny_model(
    *, tied: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64, exact: bool = True
) -> PreTrainedModel:
    """A Qwen2 model of two layers, with weights so large that its distributions are far from uniform.

    If `exact`, its norms compute in its dtype, not in float32 as those of transformers do.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
        use_cache=False,
    )
    model = Qwen2ForCausalLM(config)
    if exact:
        for parent in [*model.modules()]:
            for name, norm in parent.named_children():
                if isinstance(norm, Qwen2RMSNorm):
                    setattr(parent, name, torch.nn.RMSNorm(config.hidden_size, eps=norm.variance_epsilon))
    return model.to(dtype).eval()


def settings(*, ranks: int = 1, row_tokens: int = 40, temperature: float = 1.0, **algorithm: object) -> Run:
    """The settings of a run with 4 problems per step."""
    return Run(
        steps=8,
        rollout=Sizes(autonomous=4, guided=3, temperature=temperature),
        algorithm=Algorithm(**(PAPER | {"teacher_top_k": TOP} | algorithm)),
        optim=Optim(lr=1e-2, warmup_steps=2),
        learner=Learner(problems_per_step=4, row_tokens=row_tokens, skip_uniform=False),
        hub=Hub(max_lag=2),
        local=Local(ranks=ranks),
    )


def groups(*, seed: int = 0, problems: int = 4, version: int = VERSION) -> list[list[Rollout]]:
    """Groups of 4 autonomous and 3 guided rollouts; the first group has no correct guided rollout."""
    rng = np.random.default_rng(seed)
    return [_group(rng, task, version) for task in range(problems)]


def shard_of(parts: list[list[Rollout]], *, problems: int, step: int = 0, version: int = VERSION) -> Shard:
    rollouts = tuple(rollout for group in parts for rollout in group)
    return Shard(step=step, version=version, problems=problems, rollouts=rollouts)


def stepper(run: Run, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> Stepper:
    """A learner sharded over all ranks of the current process group."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = shard(Policy(model), mesh, precision="float32")
    frozen = shard(Policy(teacher).requires_grad_(False), mesh, precision="float32") if teacher else None
    found = Stepper(run, policy, optimiser.build(policy, run.optim), Teacher(run.algorithm, frozen))
    found.responses = demonstrations if run.algorithm.needs_responses else None
    if run.algorithm.reads_in_context:
        found.contexts = contexts if run.algorithm.objective == "rlcsd" else right_contexts
    if run.algorithm.reference_kl:
        copy = shard(Policy(tiny_model(seed=START)).requires_grad_(False), mesh, precision="float32")
        found.reference = Teacher(run.algorithm, copy, kind="frozen")
    return found


def right_contexts(autonomous: Sequence[Rollout]) -> dict[int, InContext]:
    """The same without the wrong prompts, as objectives get them that do not compare with wrong contexts."""
    return {slot: InContext(found.right) for slot, found in contexts(autonomous).items()}


def contexts(autonomous: Sequence[Rollout]) -> dict[int, InContext]:
    """The teacher's prompts of a group's rollouts, a right one and two wrong ones; the third rollout has none."""
    found = {}
    for rollout in autonomous:
        rng = np.random.default_rng([2000, rollout.task, rollout.slot])
        first, *others = (
            np.concatenate((rng.integers(0, VOCABULARY, rng.integers(1, 5), dtype=np.int32), rollout.prompt))
            for _ in range(3)
        )
        if rollout.slot != 2:
            found[rollout.slot] = InContext(first, tuple(others))
    return found


def demonstrations(task: int) -> np.ndarray | None:
    """The response of each task of `groups`; the second task has none."""
    rng = np.random.default_rng(1000 + task)
    return None if task == 1 else rng.integers(0, VOCABULARY, rng.integers(3, 9), dtype=np.int32)


def _group(rng: np.random.Generator, task: int, version: int) -> list[Rollout]:
    plain = rng.integers(0, VOCABULARY, rng.integers(2, 8), dtype=np.int32)
    strategy = rng.integers(0, VOCABULARY, rng.integers(2, 6), dtype=np.int32)
    rewards = [task % 2, 1, 0, 0] if task != 3 else [0, 0, 0, 0]
    group = []
    for slot in range(7):
        guided, length = slot >= 4, int(rng.integers(1, 12))
        reward = (task > 0 and slot != 5) if guided else rewards[slot]
        split = sorted({int(rng.integers(1, length + 1)), length})
        group.append(
            Rollout(
                task=task,
                attempt=0,
                slot=slot,
                purpose="train",
                guided=guided,
                prompt=np.concatenate((strategy, plain)) if guided else plain,
                tokens=rng.integers(0, VOCABULARY, length, dtype=np.int32),
                logprobs=rng.uniform(-4, -0.5, length).astype(np.float32),
                versions=np.array([version - 1, version][-len(split) :], np.int32),
                digests=np.zeros_like(np.array([version - 1, version][-len(split) :], np.int32), np.int64),
                ends=np.array(split, np.int32),
                reward=float(reward),
                finish="stop",
                unguided_logprob=float(rng.uniform(-30, -3)) if guided and reward else None,
                **(_most_likely(length, seed=[task, slot, length]) if guided and reward else {}),
            )
        )
    return group


def _most_likely(length: int, *, seed: list[int]) -> dict[str, np.ndarray]:
    """The most likely tokens that an engine reports at each of `length` positions."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=2.0, size=(length, VOCABULARY))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-log_p, axis=-1)[:, :TOP]
    return {
        "top_tokens": order.astype(np.int32).reshape(-1),
        "top_logprobs": np.take_along_axis(log_p, order, -1).astype(np.float32).reshape(-1),
    }


def spread(parts: list[list[Rollout]], *, seed: int = 0, version: int = 5) -> list[list[Rollout]]:
    """The same groups, with each rollout divided into up to three spans of ascending versions, at lag 2 or less."""
    rng = np.random.default_rng(seed)
    return [[_in_spans(rng, rollout, version) for rollout in group] for group in parts]


def with_observations(parts: list[list[Rollout]], *, seed: int = 0) -> list[list[Rollout]]:
    """The same groups, with one or two spans in each rollout that an environment wrote, if it is long enough."""
    rng = np.random.default_rng(seed)
    return [[_observed(rng, rollout) for rollout in group] for group in parts]


def truncated(parts: list[list[Rollout]], *, seed: int = 0) -> list[list[Rollout]]:
    """The same groups, sampled from one to all tokens of the vocabulary at each position, none where observed."""
    rng = np.random.default_rng(seed)
    return [[_truncated(rng, rollout) for rollout in group] for group in parts]


def _truncated(rng: np.random.Generator, rollout: Rollout) -> Rollout:
    kept = []
    for token, own in zip(rollout.tokens.tolist(), rollout.sampled.tolist(), strict=True):
        others = rng.permutation([v for v in range(VOCABULARY) if v != token])
        kept.append(others[: int(rng.choice([0, 0, 1, 2, 5, VOCABULARY - 1])) * own])
    sizes = np.array([len(own) for own in kept], np.int32)
    logprobs = np.where(sizes > 0, rollout.logprobs, np.float32(0))  # a token that was kept alone is certain
    return replace(rollout, logprobs=logprobs, kept=np.concatenate(kept).astype(np.int32), kept_sizes=sizes)


def _observed(rng: np.random.Generator, rollout: Rollout) -> Rollout:
    length, version = len(rollout.tokens), int(rollout.versions[-1])
    turns = min(int(rng.integers(1, 3)), (length - 1) // 2)
    cuts = [*np.sort(rng.choice(np.arange(1, length), 2 * turns, replace=False)).tolist(), length]
    versions = [OBSERVED if span % 2 else version for span in range(len(cuts))]
    logprobs = rollout.logprobs.copy()
    for start, end in zip(cuts[:-1:2], cuts[1::2], strict=True):
        logprobs[start:end] = 0.0
    return replace(
        rollout,
        versions=np.array(versions, np.int32),
        digests=np.zeros(len(versions), np.int64),
        ends=np.array(cuts, np.int32),
        logprobs=logprobs,
    )


def _in_spans(rng: np.random.Generator, rollout: Rollout, version: int) -> Rollout:
    length = len(rollout.tokens)
    spans = int(rng.integers(1, min(3, length) + 1))
    cuts = np.sort(rng.choice(np.arange(1, length), spans - 1, replace=False))
    versions = version - 2 + np.sort(rng.choice(3, spans, replace=False))
    return replace(
        rollout,
        versions=versions.astype(np.int32),
        digests=np.zeros_like(versions.astype(np.int32), np.int64),
        ends=np.append(cuts, length).astype(np.int32),
    )


def reference_mismatch(model: PreTrainedModel, parts: list[list[Rollout]], *, version: int = 5) -> dict[str, object]:
    """The metrics of `learner.mismatch`, computed token by token over the autonomous rollouts."""
    cells: dict[str, list[float]] = {f"{a}_{s}": [] for a in ("lag0", "stale") for s in ("first", "later")}
    by_lag: dict[str, list[float]] = {}
    for rollout in (r for group in parts for r in group if not r.guided):
        log_pi = log_probs(model, rollout.prompt, rollout.tokens).detach().numpy()
        for t, token in enumerate(rollout.tokens):
            span = next(s for s, end in enumerate(rollout.ends) if t < end)
            lag = version - int(rollout.versions[span])
            log_rho = float(log_pi[t, token]) - float(rollout.logprobs[t])
            cells[f"{'stale' if lag else 'lag0'}_{'later' if span else 'first'}"].append(log_rho)
            by_lag.setdefault(str(lag), []).append(log_rho)
    found: dict[str, object] = {
        "mismatch_by_lag": {lag: np.mean(np.abs(x)) for lag, x in by_lag.items()},
        "ratio_by_lag": {lag: np.mean(np.exp(x)) for lag, x in by_lag.items()},
    }
    for cell, x in cells.items():
        found[f"mismatch_tokens_{cell}"] = len(x)
        found[f"mismatch_mean_{cell}"] = np.mean(np.abs(x)) if x else None
        found[f"mismatch_max_{cell}"] = np.max(np.abs(x)) if x else None
        found[f"mismatch_kl_{cell}"] = np.mean(np.exp(x) - 1 - np.array(x)) if x else None
    return found


def log_probs(model: PreTrainedModel, prompt: np.ndarray, completion: np.ndarray, temperature: float = 1.0) -> Tensor:
    """Compute log pi(.|prompt, completion so far) before each completion token: [T, V]."""
    ids = torch.from_numpy(np.concatenate((prompt, completion))).long()[None]
    log_probs = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
    return log_probs[len(prompt) - 1 : -1]
