"""Trains the policy of a run with TRL's GRPOTrainer, for `sgpo-async bench trl --trl PYTHON`.

    PYTHON -m torch.distributed.run --nproc-per-node=N trl_worker.py SETTINGS      SETTINGS: a JSON file of `bench.trl`

Each process writes OUT-RANK.json when training has ended: `ended_s` and `tokens`, the time at the end of each step, in
seconds since the start of training and without evaluations, and the tokens of the completions that this process has
trained so far; `evaluations`, [step, pass rate] on the held-out problems, from the first process alone; and
`generating_s`, the time in `generate`. This file imports nothing of sgpo_async but the verifier, which is a file that
imports only the standard library.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Figures(TrainerCallback):
    """What is measured, and the reward function, which is told of all completions."""

    def __init__(self, settings: dict[str, Any], tokenizer: Any) -> None:
        self._settings, self._tokenizer = settings, tokenizer
        self._verify = verifier(settings["verifier"])
        self._began = self._left_out = 0.0
        self._tokens: list[int] = []  # of the completions of each call
        self.ended_s: list[float] = []
        self.evaluations: list[tuple[int, float]] = []

    def reward(
        self, completions: list[str], answer: list[str], completion_ids: list[list[int]], **_: Any
    ) -> list[float]:
        """The verifier's verdict on each completion."""
        self._tokens.append(sum(map(len, completion_ids)))
        return [float(self._verify(*pair)) for pair in zip(answer, completions, strict=True)]

    @property
    def tokens(self) -> list[float]:
        """Tokens of completions at the end of each step; a generation is trained in equal parts."""
        parts = self._settings["trainer"]["steps_per_generation"]
        return [sum(self._tokens[: i // parts]) + self._tokens[i // parts] * (i % parts + 1) / parts
                for i in range(len(self.ended_s))]  # fmt: skip

    def on_train_begin(self, *_: Any, **kwargs: Any) -> None:
        """Start the clock, after an evaluation of the initial policy."""
        self._evaluate(0, kwargs["model"])
        self._began, self._left_out = time.monotonic(), 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Take the time; evaluate if it is due."""
        self.ended_s.append(time.monotonic() - self._began - self._left_out)
        if state.global_step % self._settings["evaluate_every"] == 0:
            self._evaluate(state.global_step, kwargs["model"])

    @torch.no_grad()
    def _evaluate(self, step: int, model: Any) -> None:
        """One completion of each held-out problem, by the first process, while the others wait."""
        began = time.monotonic()
        if int(os.environ["RANK"]) == 0:
            model.eval()
            prompts, answers = self._settings["held_out"]["prompt"], self._settings["held_out"]["answer"]
            given = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            given.pop("token_type_ids", None)
            limit = self._settings["trainer"]["max_completion_length"]
            ends = {"eos_token_id": self._tokenizer.eos_token_id, "pad_token_id": self._tokenizer.pad_token_id}
            sampling = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, max_new_tokens=limit, **ends)
            state = torch.get_rng_state()  # an evaluation does not change what is trained
            whole = type(model).generate(model, **given, generation_config=sampling)  # not the one that is timed
            torch.set_rng_state(state)
            texts = self._tokenizer.batch_decode(whole[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
            right = sum(self._verify(*pair) for pair in zip(answers, texts, strict=True))
            self.evaluations.append((step, right / len(texts)))
            model.train()
        torch.distributed.barrier()
        self._left_out += time.monotonic() - began


def verifier(file: str) -> Any:
    """The function `is_correct` of a file."""
    spec = importlib.util.spec_from_file_location("verifier", file)
    assert spec and spec.loader, file
    module = importlib.util.module_from_spec(spec)
    sys.modules["verifier"] = module
    spec.loader.exec_module(module)
    return module.is_correct


def timed_generate(model: Any) -> list[float]:
    """Let the model record how long each call of its `generate` takes, in the list that is returned."""
    generate, seconds = model.generate, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        found = generate(*args, **kwargs)
        seconds.append(time.monotonic() - began)
        return found

    model.generate = timed
    return seconds


def main(path: str) -> int:
    """Train as the settings say, and write what was measured."""
    settings = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    generating = timed_generate(model)
    figures = Figures(settings, tokenizer)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=figures.reward,
        args=GRPOConfig(**settings["trainer"]),
        train_dataset=Dataset.from_dict(settings["problems"]),
        processing_class=tokenizer,
        callbacks=[figures],
    )
    trainer.train()
    found = {
        "ended_s": figures.ended_s,
        "tokens": figures.tokens,
        "evaluations": figures.evaluations,
        "generating_s": sum(generating),
    }
    Path(f"{settings['out']}-{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
