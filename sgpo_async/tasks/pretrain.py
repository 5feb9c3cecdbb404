"""Makes a built-in domain's base policy: `python -m sgpo_async.tasks.pretrain --domain NAME [--contexts] --out DIR`.

Supervised training on solutions that guess where nothing helps them (`cues_policy`, `chains_policy`). It takes some
minutes on one core.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ForCausalLM

from sgpo_async.config.experiment import Base, Domain
from sgpo_async.errors import DataError
from sgpo_async.files import set_usual_modes
from sgpo_async.model.folder import load_tokenizer
from sgpo_async.tasks import chains_policy, cues_policy
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.sources import open_source
from sgpo_async.tasks.verify import VERIFIERS
from sgpo_async.tasks.word_policy import small_config, word_tokenizer

BATCH, PEAK_LR = 96, 3e-3
CONTINUED_LR = 1e-3  # peak learning rate when training continues from an existing policy
MAX_NEW_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class Specification:
    """What a domain's base policy reads and writes."""

    vocabulary: tuple[str, ...]
    draw_example: Callable[..., tuple[str, str]]  # (random numbers, progress of the training) -> prompt, solution


SPECIFICATIONS: dict[Domain, Specification] = {
    "cues": Specification(vocabulary=cues_policy.VOCABULARY, draw_example=cues_policy.draw_example),
    "chains": Specification(vocabulary=chains_policy.VOCABULARY, draw_example=chains_policy.draw_example),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings that determine the result; see `config.experiment.Base`, whose defaults made builtin:cues."""

    domain: Domain
    contexts: bool  # whether it reads solutions and answers as well as strategies
    seed: int
    steps: int
    p_true: float
    p_favourite: float


def draw_batch(
    rng: random.Random, tokenizer: Any, recipe: Recipe, *, progress: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids [B, T] padded on the right, labels [B, T] with -100 outside the solutions)."""
    ids, labels = [], []
    draw = SPECIFICATIONS[recipe.domain].draw_example
    for _ in range(BATCH):
        prompt, solution = draw(
            rng, progress, contexts=recipe.contexts, p_true=recipe.p_true, p_favourite=recipe.p_favourite
        )
        head = tokenizer.convert_tokens_to_ids(prompt.split())
        tail = [*tokenizer.convert_tokens_to_ids(solution.split()), tokenizer.eos_token_id]
        ids.append(torch.tensor(head + tail))
        labels.append(torch.tensor([-100] * len(head) + tail))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id), pad(
        labels, batch_first=True, padding_value=-100
    )


def train(model: Any, tokenizer: Any, recipe: Recipe, *, continued: bool) -> None:
    """Train the model. Problems grow, or have all sizes from the start if `continued`."""
    rng = random.Random(recipe.seed)
    peak = CONTINUED_LR if continued else PEAK_LR
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=peak, total_steps=recipe.steps, pct_start=0.15)
    started = time.monotonic()
    for step in range(recipe.steps):
        progress = 1.0 if continued else step / recipe.steps
        ids, labels = draw_batch(rng, tokenizer, recipe, progress=progress)
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
    domain: Domain = "cues",
    guided: bool,
    sample: bool = True,
) -> float:
    """Share of problems that one completion solves, sampled at temperature 1 or decoded greedily."""
    prompts = [f"{p.strategy} {p.problem}" if guided else p.problem for p in problems]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=sample, top_k=0 if sample else None)
    texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    is_correct = VERIFIERS[domain]
    return sum(is_correct(p.answer, text) for p, text in zip(problems, texts, strict=True)) / len(problems)


def pretrain(recipe: Recipe, *, out: Path, start: str | None = None) -> dict[str, float]:
    """Write model and tokenizer to `out`; returns pass rates at temperature 1, by name.

    Args:
        start: folder of a base policy to continue from, to change only its guesses without a strategy.

    Raises DataError if `start` is of another domain.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = word_tokenizer(SPECIFICATIONS[recipe.domain].vocabulary)
    config = small_config(tokenizer)
    if start and load_tokenizer(start).get_vocab() != tokenizer.get_vocab():
        raise DataError(f"{start}: has another vocabulary than the domain {recipe.domain}; start from a policy of it")
    model = Qwen3ForCausalLM.from_pretrained(start) if start else Qwen3ForCausalLM(config)
    train(model, tokenizer, recipe, continued=start is not None)
    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    set_usual_modes(out)
    problems = list(open_source(recipe.domain, path="", held_out=400, seed=0).held_out())

    def rate(**how: bool) -> float:
        return pass_rate(model, tokenizer, problems, domain=recipe.domain, **how)

    return {"guided": rate(guided=True), "auto": rate(guided=False), "auto_greedy": rate(guided=False, sample=False)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the base policy of a built-in domain.")
    parser.add_argument("--domain", choices=SPECIFICATIONS, default="cues")
    parser.add_argument("--contexts", action="store_true", help="it also reads solutions and answers")
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # with several threads, floating-point sums differ from run to run
    recipe = Recipe(**Base(domain=arguments.domain, contexts=arguments.contexts).pretraining)
    for name, rate in pretrain(recipe, out=arguments.out).items():
        print(f"{name} pass rate {rate:.3f}")


if __name__ == "__main__":
    main()
