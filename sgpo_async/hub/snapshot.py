"""The hub's state as bytes, for a checkpoint: counters, data position, queue, buffer with its rollouts, figures.

What is in flight is not carried over. On load, the rollouts of leases are dropped ("resume") and their tasks wait for
an attempt that no lease ever had, so whatever actors still send for the abandoned past is recognised as late.

The resumed weights get a version above every earlier one, although their optimiser step is an old one. Versions of
buffered tokens are shifted by the same amount: their lag, counted in optimiser steps, stays what it was.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, fields, replace
from typing import Any

import msgpack
import numpy as np

from sgpo_async.errors import HubError
from sgpo_async.hub.evaluation import Evaluation, without_problems
from sgpo_async.hub.leases import LeaseTable
from sgpo_async.hub.ledger import Ledger
from sgpo_async.hub.training import Training
from sgpo_async.rollout.completed import CompletedGroup
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire.records import BenchmarkScore, Evaluated, Rollout

FORMAT = 2
DTYPES = ("<i4", "<f4")  # by extension code
BOOK_COUNTERS = ("reissued", "duplicates", "tokens")


def dump(training: Training, evaluation: Evaluation) -> bytes:
    """The state as MessagePack."""
    state = {
        "format": FORMAT,
        "round_size": evaluation.problems,
        "version": training.version,
        "step": training.step,
        "position": training.position,
        "tokens_trained": training.tokens_trained,
        "training": _dump_book(training.leases),
        "evaluation": _dump_book(evaluation.leases),
        "asked": list(evaluation.asked),
        "current": evaluation.current,
        "begun": evaluation.begun,
        "results": [asdict(result) for result in evaluation.results],
    }
    return msgpack.packb(state, default=_pack_array)


def load(state: bytes, *, training: Training, evaluation: Evaluation) -> tuple[Training, Evaluation]:
    """The state that `dump` stored, as successor of the present one; an empty `state` is the beginning of the run.

    Raises HubError if it cannot be read or does not fit this run.
    """
    try:
        saved = _read(state) if state else None
        version, attempt = _next(saved, training=training, evaluation=evaluation)
        new_training = Training(training.run, training.task_sampler, version=version, first_attempt=attempt)
        new_evaluation = Evaluation(training.task_sampler, version=version, first_attempt=attempt)
        if saved:
            _fill_training(new_training, saved, shift=version - saved["version"])
            _fill_evaluation(new_evaluation, saved)
        new_training.leases.check()
        new_evaluation.leases.check()
        return new_training, new_evaluation
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise HubError(f"hub state in the checkpoint is damaged ({error!r}): resume from an older one") from error


def _read(state: bytes) -> dict[str, Any]:
    saved: dict[str, Any] = msgpack.unpackb(state, ext_hook=_unpack_array)
    if saved["format"] != FORMAT:
        raise HubError(f"hub state has format {saved['format']!r}, this hub reads {FORMAT}: use its own release")
    return saved


def _next(saved: dict[str, Any] | None, *, training: Training, evaluation: Evaluation) -> tuple[int, int]:
    """A version and an attempt above all that ever were."""
    version, attempts = training.version, [training.leases.last_attempt, evaluation.leases.last_attempt]
    if saved:
        version = max(version, saved["version"])
        attempts += [saved["training"]["last_attempt"], saved["evaluation"]["last_attempt"]]
    return version + 1, max(attempts) + 1


def _fill_training(training: Training, saved: dict[str, Any], *, shift: int) -> None:
    training.step, training.position = saved["step"], saved["position"]
    training.base -= training.step
    training.tokens_trained = saved["tokens_trained"]
    _fill_book(training.leases, saved["training"], task_sampler=training.task_sampler, shift=shift)


def _fill_evaluation(evaluation: Evaluation, saved: dict[str, Any]) -> None:
    if saved["round_size"] != evaluation.problems:
        raise HubError(
            f"tasks.held_out, evaluation.benchmarks: the checkpoint was made with {saved['round_size']} problems to "
            f"evaluate, this run has {evaluation.problems}: use the same"
        )
    evaluation.asked, evaluation.current = deque(saved["asked"]), saved["current"]
    evaluation.begun = saved["begun"]
    evaluation.results = [_evaluated(result) for result in saved["results"]]
    _fill_book(evaluation.leases, saved["evaluation"], task_sampler=evaluation.task_sampler, shift=0)


def _dump_book(leases: LeaseTable) -> dict[str, Any]:
    return {
        "tasks": _plain(leases.tasks),
        "rollouts": _plain(leases.rollouts),
        "last_attempt": leases.last_attempt,
        "waiting": [task.number for _, _, task in leases.waiting],
        "running": [(lease.task.number, lease.task.size) for lease in leases.running.values()],
        "complete": [
            (group.number, group.attempt, [_plain(r) for r in group.rollouts]) for group in leases.complete.values()
        ],
        **{name: getattr(leases, name) for name in BOOK_COUNTERS},
    }


def _fill_book(leases: LeaseTable, saved: dict[str, Any], *, task_sampler: TaskSampler, shift: int) -> None:
    leases.tasks, leases.rollouts = _ledger(saved["tasks"]), _ledger(saved["rollouts"])
    for number in saved["waiting"]:
        leases.wait(task_sampler.task(number), attempt=leases.first_attempt)
    for number, size in saved["running"]:
        leases.rollouts.drop("resume", size)
        leases.wait(task_sampler.task(number), attempt=leases.first_attempt)
    for number, attempt, rollouts in saved["complete"]:
        shifted = tuple(_shifted(Rollout(**rollout), shift) for rollout in rollouts)
        leases.complete[number] = CompletedGroup(number=number, attempt=attempt, rollouts=shifted)
    for name in BOOK_COUNTERS:
        setattr(leases, name, saved[name])


def _evaluated(saved: dict[str, Any]) -> Evaluated:
    """Without its problems, which states of older releases hold: the learner had them before it asked for the state."""
    scores = tuple(BenchmarkScore(**score) for score in saved["benchmarks"])
    return without_problems(Evaluated(**saved | {"benchmarks": scores}))


def _ledger(saved: dict[str, Any]) -> Ledger:
    return Ledger(saved["dispatched"], saved["trained"], Counter(saved["dropped"]))


def _shifted(rollout: Rollout, shift: int) -> Rollout:
    return replace(rollout, versions=rollout.versions + np.int32(shift))


def _plain(record: Rollout | Ledger) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _pack_array(value: object) -> msgpack.ExtType:
    assert isinstance(value, np.ndarray), value
    return msgpack.ExtType(DTYPES.index(value.dtype.str), value.tobytes())


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    return np.frombuffer(data, DTYPES[code])
