"""Tokens per second of the embedded engine, against others with the same model and requests.

    sgpo-async bench engine [--quick] [--model FOLDER] [--sglang PYTHON] [--to DIR]

    embedded    continuous batching: a finished completion leaves its row to the next request
    generate    of transformers: batches of as many rows, padded, each as long as its longest completion
    sglang      a server on the CPU, over HTTP; only with --sglang (make sglang-cpu: .venv-sglang/bin/python)

All have one thread, the same prompts in the same order, the same lengths, temperature 1, the whole vocabulary, and as
many rows. No token ends a completion but the last one of its length, so all sample the same number of tokens; the
lengths are either all equal, or lognormal with the same mean. Time is CPU time, because other processes then matter
less; with one thread it is the time on an idle machine. That of SGLang is the time of its server's processes and of
the requests.
The embedded engine and SGLang also report the log-probability of each token, as training needs it; `generate` does not.
All take turns; a ratio is computed within each turn.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from sgpo_async.bench.figures import (
    columns,
    header,
    interval,
    load,
    machine,
    publish,
    ratio,
    spread,
    verdict,
    versions,
    versions_elsewhere,
)
from sgpo_async.bench.served import Request, Served
from sgpo_async.config import Run
from sgpo_async.engines import EmbeddedEngine, Weights
from sgpo_async.engines.base import Generate, Generated
from sgpo_async.engines.sglang.engine import RESERVED
from sgpo_async.installation import sglang_for_cpus
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.model.load import load_model, longest
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.sources import source_of
from sgpo_async.weights import digest

BUILTIN = "builtin:cues"
LENGTHS = ("equal", "lognormal")
SIGMA = 0.8  # of the logarithm of the lognormal lengths
BARS = {"generate": {"equal": 1.0, "lognormal": 2.0}, "sglang": {"equal": 1.0, "lognormal": 1.0}}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    slots: int = 128  # rows of the engine, and of a batch of `generate`
    batches: int = 4  # this many times `slots` requests
    mean: int = 32  # tokens of a completion
    turns: int = 7
    seed: int = 0


FULL, QUICK = Sizes(), Sizes(batches=2, turns=2)
OTHER, OTHER_QUICK = Sizes(slots=16, batches=3, turns=3), Sizes(slots=8, batches=2, mean=8, turns=2)  # of --model


class Way(Protocol):
    """One way to sample."""

    def __call__(self, work: Sequence[Request]) -> int:
        """Sample all requests; return the number of tokens."""

    def cpu_s(self) -> float:
        """CPU seconds that it has used so far."""


def run_bench_engine(*, quick: bool, model: str, sglang: str, to: Path) -> int:
    """Measure the built-in policy, and `model` if it is not empty; print tables, write engine.txt and engine.json.

    `sglang` is the Python of an environment with SGLang; "": without it. Raises DataError if there is no such model,
    EngineError if SGLang does not come up.
    """
    sizes = {BUILTIN: QUICK if quick else FULL}
    if model:
        sizes[model] = OTHER_QUICK if quick else OTHER
    before = load()
    known = versions("torch", "transformers")
    if sglang:
        known |= versions_elsewhere(sglang, "sglang", given=f"--sglang {sglang}", remedy=sglang_for_cpus())
    models = [{"model": Path(path).name} | measure(path, one, sglang) for path, one in sizes.items()]
    report = {
        "machine": machine(),
        "versions": known,
        "load": [before, load()],
        "models": models,
    }
    publish("engine", to, table(report), report)
    return 0


def measure(path: str, sizes: Sizes, sglang: str) -> dict[str, Any]:
    """Tokens per second of each way and kind of lengths, and the ratios."""
    folder = model_folder(path)
    ways: dict[str, Way] = {"embedded": Embedded(folder, sizes.slots), "generate": Padded(folder, sizes.slots)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        if sglang:
            server = Served(folder, sizes.slots, sglang)
            stack.callback(server.close)
            ways["sglang"] = server
        return measure_ways(ways, folder, sizes)


def measure_ways(ways: dict[str, Way], folder: str, sizes: Sizes) -> dict[str, Any]:
    """Measure `ways` in turns."""
    prompts = prompts_of(folder, sizes)
    work = {kind: requests(prompts, lengths_of(kind, sizes, prompts, longest_of(folder))) for kind in LENGTHS}
    for sample in ways.values():
        sample([one._replace(length=2) for one in work["equal"][: sizes.slots]])  # loads the kernels
    rates: dict[str, dict[str, list[float]]] = {kind: {way: [] for way in ways} for kind in LENGTHS}
    for turn, kind, way in itertools.product(range(sizes.turns), LENGTHS, ways):
        print(f"turn {turn + 1} of {sizes.turns}: {Path(folder).name}, {kind} lengths, {way} ...", file=sys.stderr)
        began = ways[way].cpu_s()
        tokens = ways[way](work[kind])
        rates[kind][way].append(tokens / (ways[way].cpu_s() - began))
        asked = sum(one.length for one in work[kind])
        assert tokens == asked, f"{way}: {tokens} of {asked} tokens"
    return {
        "sizes": vars(sizes),
        "lengths": {kind: sorted(one.length for one in own) for kind, own in work.items()},
        "tokens_per_s": {kind: {way: spread(turns) for way, turns in own.items()} for kind, own in rates.items()},
        "ratios": {
            kind: [
                ratio("embedded", other, BARS[other][kind], (own["embedded"], own[other]))
                for other in BARS
                if other in own
            ]
            for kind, own in rates.items()
        },
    }


def prompts_of(folder: str, sizes: Sizes) -> list[list[int]]:
    """Prompts of the built-in problems as a run has them: two thirds without a strategy, one third with it."""
    run, tokenizer = Run(seed=sizes.seed), load_tokenizer(folder)
    source = source_of(run)
    problems = [source.training(number) for number in range(sizes.slots * sizes.batches)]
    return [
        build_prompt(one.problem, one.strategy if i % 3 == 2 else None, tasks=run.tasks, tokenizer=tokenizer)
        for i, one in enumerate(problems)
    ]


def longest_of(folder: str) -> int:
    """Positions that the model has."""
    return int(longest(load_model(folder, device="cpu", dtype="float32")))


def lengths_of(kind: str, sizes: Sizes, prompts: Sequence[Sequence[int]], positions: int) -> list[int]:
    """Lengths of completions with the mean `sizes.mean`, as far as the model's positions allow."""
    # SGLang truncates completions that need its reserved positions; all engines get the same lengths.
    count, most = len(prompts), positions - max(map(len, prompts)) - RESERVED
    if kind == "equal":
        return [min(sizes.mean, most)] * count
    drawn = np.random.default_rng(sizes.seed).lognormal(np.log(sizes.mean) - SIGMA**2 / 2, SIGMA, count)
    return [int(one) for one in np.clip(drawn.round(), 1, min(most, 8 * sizes.mean))]


def requests(prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[Request]:
    """One request for each prompt."""
    return [Request(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]


class InProcess:
    """A way that samples in this process."""

    def cpu_s(self) -> float:
        """CPU seconds of this process."""
        return time.process_time()


class Embedded(InProcess):
    """The engine of an actor."""

    def __init__(self, folder: str, slots: int) -> None:
        model = load_model(folder, device="cpu", dtype="float32")
        tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        self._engine = EmbeddedEngine(model, digest=digest, slots=slots, end_ids=())
        self._engine.load(Weights(version=0, digest=digest(tensors.items()), read=tensors.copy))

    def __call__(self, work: Sequence[Request]) -> int:
        """Sample all; return the number of tokens."""
        for i, one in enumerate(work):
            prompt = np.array(one.prompt, np.int32)
            self._engine.submit(Generate(id=i, prompt=prompt, max_new_tokens=one.length, temperature=1.0, seed=i))
        tokens, left = 0, len(work)
        while left:
            finished = self._engine.step(0.0)
            left -= len(finished)
            for found in finished:
                assert isinstance(found, Generated), found
                tokens += len(found.tokens)
        return tokens


class Ends(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, ends: Sequence[int]) -> None:
        self._ends = torch.tensor(ends)  # [rows], prompt and padding included

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Which rows have ended: [rows] bool."""
        return self._ends <= input_ids.shape[1]


class Padded(InProcess):
    """`generate` of transformers, a batch at a time, with prompts padded on the left."""

    def __init__(self, folder: str, rows: int) -> None:
        self._model: PreTrainedModel = load_model(folder, device="cpu", dtype="float32")
        self._rows = rows
        self._model.generation_config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0, eos_token_id=None
        )

    @torch.inference_mode()
    def __call__(self, work: Sequence[Request]) -> int:
        """Sample all; return the number of tokens that were asked for."""
        torch.manual_seed(0)
        return sum(self._batch(work[first : first + self._rows]) for first in range(0, len(work), self._rows))

    def _batch(self, batch: Sequence[Request]) -> int:
        width = max(len(one.prompt) for one in batch)
        ids = torch.tensor([[0] * (width - len(one.prompt)) + one.prompt for one in batch])
        mask = torch.tensor([[0] * (width - len(one.prompt)) + [1] * len(one.prompt) for one in batch])
        longest_length = max(one.length for one in batch)
        whole = self._model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            max_new_tokens=longest_length,
            stopping_criteria=StoppingCriteriaList([Ends([width + one.length for one in batch])]),
        )
        assert whole.shape == (len(batch), width + longest_length), whole.shape
        return sum(one.length for one in batch)


def table(report: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    seed = report["models"][0]["sizes"]["seed"]
    lines = header(
        report, f"tokens sampled per second of CPU time, one thread; median (least..most) of the turns; seed {seed}"
    )
    for one in report["models"]:
        sizes = one["sizes"]
        rows = [["lengths", "mean", "longest", "embedded", "peer", "tokens/s", "ratio", "bar", ""]]
        for kind, rates in one["tokens_per_s"].items():
            lengths = one["lengths"][kind]
            rows += [
                [
                    kind,
                    f"{np.mean(lengths):.1f}",
                    str(lengths[-1]),
                    interval(rates["embedded"], ".0f"),
                    compared["to"],
                    interval(rates[compared["to"]], ".0f"),
                    interval(compared),
                    f"{compared['bar']:g}",
                    verdict(compared),
                ]
                for compared in one["ratios"][kind]
            ]
        about = f"{len(one['lengths']['equal'])} requests, {sizes['slots']} rows; turns: {sizes['turns']}"
        lines += ["", f"{one['model']}: {about}", *columns(rows)]
    return lines
