"""SGPO (arXiv 2606.24064) in one file: the synchronous method on the built-in domain, in the order of the paper.

    python examples/sgpo_in_one_file.py [STEPS]

One process, one policy, one engine; no hub, no packing, no staleness. The package's learner computes the same loss from
hidden states, packed, sharded and corrected for lag. This is anchored SGPO: the teacher is the initial policy, no token
is masked, and alpha0 and alpha_max are twice the paper's. What the package's default has beyond that, and why, is in
docs/algorithm.md.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sgpo_async.algorithm import (
    adaptive_weight,
    distillation_loss,
    forward_kl,
    group_advantages,
    grpo_loss,
    select_reachable,
    sgpo_loss,
)
from sgpo_async.config import Tasks
from sgpo_async.engines import EmbeddedEngine, Generate, Generated, Weights
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.model.load import load_model
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.verify import VERIFIERS
from sgpo_async.weights import digest

PROBLEMS, G1, G2 = 16, 8, 4  # problems per step; autonomous and guided rollouts per problem
STEPS, LEARNING_RATE, WARMUP = 120, 8e-4, 10
ALPHA0, ALPHA_MAX = 1.0, 1.6  # the paper: 0.5 and 0.8
MAX_NEW_TOKENS, HELD_OUT, EVALUATE_EVERY = 40, 100, 20

FOLDER = model_folder("builtin:cues")
TOKENIZER = load_tokenizer(FOLDER)


@dataclass
class Rollouts:
    """G completions of one prompt."""

    prompt: np.ndarray  # [L]
    tokens: list[np.ndarray]  # G arrays [T]
    rewards: Tensor  # [G], 1 for a correct completion, else 0


class Sampler:
    """Generates rollouts with one engine."""

    def __init__(self) -> None:
        self.engine = EmbeddedEngine.from_pretrained(FOLDER, digest=digest, slots=128, device="cpu")

    def load(self, policy: nn.Module, version: int) -> None:
        """Load the current weights of `policy` into the engine."""
        tensors = {name: parameter.detach() for name, parameter in policy.named_parameters()}
        self.engine.load(Weights(version=version, digest=digest(tensors.items()), read=tensors.copy))

    def roll_out(self, problems: list[Problem], count: int, *, guided: bool, seed: int) -> list[Rollouts]:
        """`count` completions of each problem: o ~ pi(.|q), or pi(.|q,s) if `guided`, with the strategy before it."""
        prompts = [prompt_of(problem, guided=guided) for problem in problems]
        for q, prompt in enumerate(prompts):
            for g in range(count):
                request_seed = hash((seed, guided, q, g)) & (2**63 - 1)
                self.engine.submit(
                    Generate(
                        id=(q, g), prompt=prompt, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=request_seed
                    )
                )
        tokens: dict[object, np.ndarray] = {}
        while len(tokens) < len(problems) * count:
            finished = self.engine.step(0.0)
            tokens |= {result.id: result.tokens for result in finished if isinstance(result, Generated)}
        groups = []
        for q, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
            completions = [tokens[q, g] for g in range(count)]
            texts = [TOKENIZER.decode(completion, skip_special_tokens=True) for completion in completions]
            rewards = torch.tensor([float(VERIFIERS["cues"](problem.answer, text)) for text in texts])
            groups.append(Rollouts(prompt, completions, rewards))
        return groups


def prompt_of(problem: Problem, *, guided: bool) -> np.ndarray:
    """Token ids of the problem, after its strategy if `guided`."""
    strategy = problem.strategy if guided else None
    return np.asarray(build_prompt(problem.problem, strategy, tasks=Tasks(), tokenizer=TOKENIZER), np.int32)


def completion_logits(policy: nn.Module, prompt: np.ndarray, tokens: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Logits [G, T, V] that predict each token of each completion of `prompt`, and the mask [G, T] without padding."""
    longest = max(map(len, tokens))
    ids = np.zeros((len(tokens), len(prompt) + longest - 1), np.int64)
    mask = torch.zeros(len(tokens), longest, dtype=torch.bool)
    for g, completion in enumerate(tokens):  # padding follows the tokens, so causal attention ignores it
        inputs = np.concatenate((prompt, completion))[:-1]
        ids[g, : len(inputs)] = inputs
        mask[g, : len(completion)] = True
    logits = policy(input_ids=torch.from_numpy(ids), use_cache=False).logits
    return logits[:, len(prompt) - 1 :], mask


def token_logprobs(logits: Tensor, tokens: list[np.ndarray], mask: Tensor) -> Tensor:
    """log pi(o_t | ...) of the sampled tokens, [G, T]; 0 at padding."""
    targets = torch.zeros(mask.shape, dtype=torch.long)
    targets[mask] = torch.from_numpy(np.concatenate(tokens)).long()
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].masked_fill(~mask, 0)


def problem_losses(
    policy: nn.Module, teacher: nn.Module, alone: Rollouts, guided: Rollouts
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """L_GRPO of each autonomous rollout [G1], L_KD of the target, alpha(q), and whether a target exists."""
    # Eq. 1: GRPO on the autonomous group. The current policy generated the rollouts: all importance ratios are 1.
    logits, mask = completion_logits(policy, alone.prompt, alone.tokens)
    log_pi = token_logprobs(logits, alone.tokens, mask)
    advantages = group_advantages(alone.rewards[None])[0]
    grpo = grpo_loss(log_pi, mask, advantages, correction=torch.ones_like(log_pi))

    # Eq. 4: the target o+ is the correct guided rollout with the highest probability under the unguided policy.
    with torch.no_grad():
        logits, mask = completion_logits(policy, alone.prompt, guided.tokens)
        reachable = token_logprobs(logits, guided.tokens, mask).sum(-1)
    index, found = select_reachable(reachable[None], guided.rewards[None])
    target = [guided.tokens[int(index)]]

    # Eq. 3 and 5: forward KL from the teacher with the strategy to the policy without it, at each token of o+.
    with torch.no_grad():
        teacher_logits, _ = completion_logits(teacher, guided.prompt, target)
    student_logits, mask = completion_logits(policy, alone.prompt, target)
    d = forward_kl(teacher_logits, student_logits)
    distillation = distillation_loss(d, mask, torch.ones_like(d), limiter="none")

    # Eq. 6: the weight of the distillation, which depends on how much the strategy helps.
    alpha = adaptive_weight(alone.rewards.mean(), guided.rewards.mean(), alpha0=ALPHA0, alpha_max=ALPHA_MAX)
    return grpo, distillation[0], alpha, found[0]


def pass_rate(sampler: Sampler, problems: list[Problem], *, guided: bool) -> float:
    """Share of `problems` solved by one completion each."""
    groups = sampler.roll_out(problems, 1, guided=guided, seed=-1)
    return float(torch.cat([group.rewards for group in groups]).mean())


def train(steps: int = STEPS) -> list[dict[str, float]]:
    """Train for `steps` steps; returns loss, mean alpha and pass rates of each step."""
    torch.manual_seed(0)
    source = CuesSource(seed=0, held_out=HELD_OUT)
    policy = load_model(FOLDER, device="cpu", dtype="float32")
    teacher = copy.deepcopy(policy).requires_grad_(False)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    sampler, history = Sampler(), []
    for step in range(steps):
        sampler.load(policy, step)
        problems = [source.training(step * PROBLEMS + i) for i in range(PROBLEMS)]
        alone = sampler.roll_out(problems, G1, guided=False, seed=step)
        guided = sampler.roll_out(problems, G2, guided=True, seed=step)

        # Eq. 7: L = mean over problems of L_GRPO + alpha(q) L_KD.
        parts = [problem_losses(policy, teacher, *pair) for pair in zip(alone, guided, strict=True)]
        grpo, distillation, alpha, found = (torch.stack(column) for column in zip(*parts, strict=True))
        loss = sgpo_loss(grpo, distillation, alpha, found)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        for group in optimiser.param_groups:  # linear warm-up, then linear decay to 0
            group["lr"] = LEARNING_RATE * min((step + 1) / WARMUP, (steps - step) / max(steps - WARMUP, 1))
        optimiser.step()

        line = {"step": step + 1, "loss": loss.item(), "alpha": alpha.mean().item()}
        line |= {"alone": _mean(alone), "guided": _mean(guided)}
        if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == steps:
            sampler.load(policy, step + 1)
            line["held_out"] = pass_rate(sampler, list(source.held_out()), guided=False)
        history.append(line)
        print("  ".join(f"{name} {value:.3g}" for name, value in line.items()), flush=True)
    return history


def _mean(groups: list[Rollouts]) -> float:
    return float(torch.stack([group.rewards.mean() for group in groups]).mean())


if __name__ == "__main__":
    train(int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
