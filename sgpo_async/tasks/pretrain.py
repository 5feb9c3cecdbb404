"""Rebuilds the base policy of the built-in domain: `python -m sgpo_async.tasks.pretrain --out DIR`.

Supervised training on solutions; half of the problems have a strategy. The techniques of a solution are drawn at random
for each problem. With a strategy they are drawn uniformly and the strategy names them, so the policy learns to follow
strategies but not which technique a cue requires. Without one they are drawn from `guess_probabilities`. Problems grow
from two steps to five. Training takes some minutes on one core.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ForCausalLM

from sgpo_async.files import set_usual_modes
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.cues_domain import STEPS, TECHNIQUES, draw_exercise, is_correct
from sgpo_async.tasks.cues_policy import P_FAVOURITE, P_TRUE, build_config, build_tokenizer, guess_probabilities

BATCH, PEAK_LR = 96, 3e-3
CONTINUED_LR = 1e-3  # peak learning rate when training continues from an existing policy
MAX_NEW_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that determine the result; the defaults produce the policy that the package ships."""

    seed: int = 7
    steps: int = 1200
    p_true: float = P_TRUE
    p_favourite: float = P_FAVOURITE

    def guesses(self, cue: str) -> dict[str, float]:
        """Technique -> probability without a strategy."""
        return guess_probabilities(cue, p_true=self.p_true, p_favourite=self.p_favourite)


def draw_example(rng: random.Random, steps: int, recipe: Recipe) -> tuple[str, str]:
    """(prompt, solution) of a training problem, guided with probability 1/2."""
    exercise = draw_exercise(rng, steps=steps)
    if rng.random() < 0.5:
        techniques = tuple(rng.choices(list(TECHNIQUES), k=steps))
        prompt = f"{exercise.strategy_text(techniques)} {exercise.problem_text()}"
    else:
        guesses = [recipe.guesses(cue) for cue in exercise.cues]
        techniques = tuple(rng.choices(list(guess), list(guess.values()))[0] for guess in guesses)
        prompt = exercise.problem_text()
    return prompt, exercise.solution_text(techniques)


def draw_batch(
    rng: random.Random, tokenizer: Any, recipe: Recipe, *, max_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids [B, T] padded on the right, labels [B, T] with -100 outside the solutions)."""
    ids, labels = [], []
    for _ in range(BATCH):
        prompt, solution = draw_example(rng, rng.randint(2, max_steps), recipe)
        head = tokenizer.convert_tokens_to_ids(prompt.split())
        tail = [*tokenizer.convert_tokens_to_ids(solution.split()), tokenizer.eos_token_id]
        ids.append(torch.tensor(head + tail))
        labels.append(torch.tensor([-100] * len(head) + tail))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id), pad(
        labels, batch_first=True, padding_value=-100
    )


def train(model: Any, tokenizer: Any, recipe: Recipe, *, continued: bool) -> None:
    """Train the model. Problems grow from two steps to five, or have up to five from the start if `continued`."""
    rng = random.Random(recipe.seed)
    peak = CONTINUED_LR if continued else PEAK_LR
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=peak, total_steps=recipe.steps, pct_start=0.15)
    started = time.monotonic()
    for step in range(recipe.steps):
        max_steps = STEPS if continued else min(STEPS, 2 + step * 8 // recipe.steps)
        ids, labels = draw_batch(rng, tokenizer, recipe, max_steps=max_steps)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def pass_rate(
    model: Any,
    tokenizer: Any,
    problems: list[Problem],
    *,
    guided: bool,
    sample: bool = True,
) -> float:
    """Share of problems that one completion solves, sampled at temperature 1 or decoded greedily."""
    prompts = [f"{p.strategy} {p.problem}" if guided else p.problem for p in problems]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=sample, top_k=0 if sample else None)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(is_correct(p.answer, text) for p, text in zip(problems, texts, strict=True)) / len(problems)


def pretrain(recipe: Recipe, *, out: Path, start: str | None = None) -> dict[str, float]:
    """Write model and tokenizer to `out`; returns pass rates at temperature 1, by name.

    Args:
        start: folder of a base policy to continue from, to change only its guesses without a strategy.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    model = Qwen3ForCausalLM.from_pretrained(start) if start else Qwen3ForCausalLM(config)
    train(model, tokenizer, recipe, continued=start is not None)
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    set_usual_modes(out)
    problems = list(CuesSource(seed=0).held_out())
    return {
        "guided": pass_rate(model, tokenizer, problems, guided=True),
        "auto": pass_rate(model, tokenizer, problems, guided=False),
        "auto_greedy": pass_rate(model, tokenizer, problems, guided=False, sample=False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the base policy of the cues domain.")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # with several threads, floating-point sums differ from run to run
    for name, rate in pretrain(Recipe(), out=arguments.out).items():
        print(f"{name} pass rate {rate:.3f}")


if __name__ == "__main__":
    main()
