"""Try a policy on single problems: one completion of the plain prompt, one of the prompt with a strategy."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from transformers.utils import logging

from sgpo_async.config import Engine as EngineSettings
from sgpo_async.config import Model, Run, load
from sgpo_async.config.schema import CHECKPOINTS, Rollout, Tasks
from sgpo_async.engines.base import Failed, Generate, Generated, Weights
from sgpo_async.engines.open import open_embedded
from sgpo_async.errors import DataError, EngineError
from sgpo_async.learner.checkpoint import newest_complete, read_weights
from sgpo_async.learner.lora import adapt
from sgpo_async.learner.policy import Policy, decoder_layers
from sgpo_async.model.adapters import merge
from sgpo_async.model.folder import load_tokenizer, model_folder
from sgpo_async.model.load import load_model
from sgpo_async.tasks.prompts import build_prompt
from sgpo_async.tasks.task_sampler import derived_seed
from sgpo_async.weights import digest

POLICY = "policy"  # the learner's export below the folder of a run
BARE_NEW_TOKENS = 512  # for a model that no run describes


class Found(NamedTuple):
    """A policy: the run whose model, prompts and engine it uses, and the checkpoint with its weights, if not exported.

    `run.model.path` is the folder of an exported policy.
    """

    run: Run
    tasks: Tasks | None  # how prompts are built; None: tasks.prompt=chat if the tokenizer has a chat template
    checkpoint: Path | None
    modified: float  # seconds since the epoch

    @property
    def name(self) -> str:
        """Where the weights are, and since when."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.modified))
        return f"{self.checkpoint or self.run.model.path}, written {when}"


class Completion(NamedTuple):
    """What the policy wrote."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]


def find_policy(folder: Path) -> Found:
    """Return the policy in `folder`: a Hugging Face folder, or the newest export or checkpoint of a run.

    Raises DataError if there is none, ConfigError if the run's config.yaml cannot be read.
    """
    if (folder / "config.json").is_file():
        return Found(_bare(folder), None, None, _written(folder))
    settings = folder / "config.yaml"
    run = load(str(settings), []) if settings.is_file() else _bare(folder)
    tasks = run.tasks if settings.is_file() else None
    found = []
    if (folder / POLICY / "config.json").is_file():
        exported = replace(run, model=replace(run.model, path=str(folder / POLICY)))
        found.append(Found(exported, tasks, None, _written(folder / POLICY)))
    if settings.is_file() and (checkpoint := newest_complete(folder / CHECKPOINTS)):
        found.append(Found(run, tasks, checkpoint, checkpoint.stat().st_mtime))
    if not found:
        raise DataError(
            f"{folder}: has neither an exported policy nor a checkpoint; a run writes the first checkpoint after "
            "learner.checkpoint_every steps, or at its end"
        )
    return max(found, key=lambda one: one.modified)


def _bare(folder: Path) -> Run:
    """The settings for a model that no run describes."""
    return Run(model=Model(path=str(folder)), rollout=Rollout(max_new_tokens=BARE_NEW_TOKENS))


def _written(folder: Path) -> float:
    return max((file.stat().st_mtime for file in folder.glob("*.safetensors")), default=folder.stat().st_mtime)


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """What is sampled; None stands for the value of the run."""

    temperature: float | None = None
    max_new_tokens: int | None = None
    prompt: str | None = None
    seed: int = 0


class Chat:
    """A policy in the embedded engine. Close it at the end.

    Raises DataError or EngineError if the model cannot be served, CheckpointError if its checkpoint cannot be read.
    """

    def __init__(self, found: Found, settings: ChatSettings) -> None:
        logging.set_verbosity_error()
        self._settings, self._number = settings, 0
        self.run = replace(found.run, engine=replace(EngineSettings(), device=found.run.engine.device))
        folder = model_folder(self.run.model.path)
        self._tokenizer = load_tokenizer(folder)
        tasks = found.tasks or Tasks(prompt="chat" if self._tokenizer.chat_template else "plain")
        self._tasks = replace(tasks, prompt=settings.prompt or tasks.prompt)
        model, lora = load_model(folder, device="cpu", dtype=self.run.model.dtype), self.run.learner.lora
        if found.checkpoint:
            if lora.rank:
                adapt(model, decoder_layers(model), lora, dtype=model.dtype)
            read_weights(found.checkpoint, Policy(model))
        parameters = dict(model.named_parameters())
        tensors = dict(merge(parameters, parameters, lora.scale))
        self._engine = open_embedded(self.run, folder)
        self._engine.load(Weights(version=0, digest=digest(tensors.items()), read=lambda: tensors))

    def close(self) -> None:
        """Free the engine."""
        self._engine.close()

    def complete(self, problem: str, strategy: str | None) -> list[Completion]:
        """Sample one completion without the strategy and, if there is one, one with it; another pair each time.

        Raises EngineError if a prompt is too long for the model.
        """
        self._number += 1
        guidances = [None] if strategy is None else [None, strategy]
        try:
            for id, guidance in enumerate(guidances):
                self._engine.submit(self._request(id, problem, guidance))
        except EngineError:
            self._engine.cancel(range(len(guidances)))
            raise
        found: dict[object, Completion] = {}
        while len(found) < len(guidances):
            for result in self._engine.step(0.0):
                if isinstance(result, Failed):
                    raise result.error
                assert isinstance(result, Generated)
                text = self._tokenizer.decode(result.tokens, skip_special_tokens=True)
                found[result.id] = Completion(text, len(result.tokens), result.finish)
        return [found[id] for id in range(len(guidances))]

    def _request(self, id: int, problem: str, strategy: str | None) -> Generate:
        sizes, own = self.run.rollout, self._settings
        prompt = build_prompt(problem, strategy, tasks=self._tasks, tokenizer=self._tokenizer)
        return Generate(
            id=id,
            prompt=np.array(prompt, np.int32),
            max_new_tokens=sizes.max_new_tokens if own.max_new_tokens is None else own.max_new_tokens,
            temperature=sizes.temperature if own.temperature is None else own.temperature,
            seed=derived_seed(own.seed, "chat", self._number, id),
        )
