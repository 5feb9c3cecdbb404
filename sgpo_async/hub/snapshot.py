"""The hub's state as bytes, for checkpoints: counters, data position, waiting tasks, buffered rollouts, evaluations.

    Training, Evaluation ── dump ──▶ bytes in a checkpoint ── load ──▶ new Training, Evaluation

Unfinished groups are not carried over. `load` drops their rollouts (reason "resume") and puts their tasks back into the
queue with an attempt number that no lease ever had. Rollouts that actors still send for leases from before the restore
are therefore recognised as late.

The restored weights get a version above every earlier one, although they belong to an earlier optimiser step. `load`
shifts the versions of buffered tokens by the same amount, so their lag in optimiser steps does not change.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import asdict, fields, replace
from typing import Any

import msgpack
import numpy as np

from sgpo_async.errors import HubError
from sgpo_async.hub.evaluation import Evaluation, without_problem_results
from sgpo_async.hub.leases import LeaseTable
from sgpo_async.hub.ledger import Ledger
from sgpo_async.hub.training import Training
from sgpo_async.rollout.completed import CompletedGroup
from sgpo_async.tasks.task_sampler import TaskSampler
from sgpo_async.wire.records import OBSERVED, BenchmarkScore, Evaluated, Rollout

FORMAT = 3
DTYPES = ("<i4", "<f4", "<i8")  # the index is the MessagePack extension code
COUNTERS = ("reissued", "duplicates", "tokens")  # attributes of LeaseTable


def dump(training: Training, evaluation: Evaluation) -> bytes:
    """The state as MessagePack."""
    state = {
        "format": FORMAT,
        "round_size": evaluation.round_size,
        "version": training.version,
        "step": training.step,
        "position": training.position,
        "tokens_trained": training.tokens_trained,
        "training": _dump_leases(training.leases),
        "evaluation": _dump_leases(evaluation.leases),
        "asked": list(evaluation.requested),
        "current": evaluation.current,
        "begun": evaluation.begun,
        "results": [asdict(result) for result in evaluation.lean_results()],
    }
    return msgpack.packb(state, default=_pack_array)


def load(state: bytes, *, training: Training, evaluation: Evaluation) -> tuple[Training, Evaluation]:
    """Restore what `dump` stored, as the successors of the present `training` and `evaluation`.

    An empty `state` restores the beginning of the run. Raises HubError if the state is damaged or does not match this
    run; then nothing has changed.
    """
    try:
        saved = _read(state) if state else None
        version, attempt = _next_version_and_attempt(saved, training=training, evaluation=evaluation)
        new_training = Training(training.run, training.task_sampler, version=version, first_attempt=attempt)
        new_evaluation = Evaluation(training.task_sampler, version=version, first_attempt=attempt)
        if saved:
            _fill_training(new_training, saved, shift=version - saved["version"])
            _fill_evaluation(new_evaluation, saved)
        new_training.leases.check()
        new_evaluation.leases.check()
        return new_training, new_evaluation
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, AssertionError) as error:
        raise HubError(
            f"the hub state in the checkpoint is damaged ({error!r}): resume from an older checkpoint"
        ) from error


def _read(state: bytes) -> dict[str, Any]:
    saved: dict[str, Any] = msgpack.unpackb(state, ext_hook=_unpack_array)
    if saved["format"] != FORMAT:
        raise HubError(
            f"the format of the hub state in the checkpoint must be {FORMAT}, got {saved['format']!r}: "
            "resume with the release that wrote the checkpoint"
        )
    return saved


def _next_version_and_attempt(
    saved: dict[str, Any] | None, *, training: Training, evaluation: Evaluation
) -> tuple[int, int]:
    """A version and an attempt that are higher than all earlier ones."""
    version, attempts = training.version, [training.leases.last_attempt, evaluation.leases.last_attempt]
    if saved:
        version = max(version, saved["version"])
        attempts += [saved["training"]["last_attempt"], saved["evaluation"]["last_attempt"]]
    return version + 1, max(attempts) + 1


def _fill_training(training: Training, saved: dict[str, Any], *, shift: int) -> None:
    training.step, training.position = saved["step"], saved["position"]
    training.base -= training.step
    training.tokens_trained = saved["tokens_trained"]
    _fill_leases(training.leases, saved["training"], task_sampler=training.task_sampler, shift=shift)


def _fill_evaluation(evaluation: Evaluation, saved: dict[str, Any]) -> None:
    if saved["round_size"] != evaluation.round_size:
        raise HubError(
            f"tasks.held_out and evaluation.benchmarks must have {saved['round_size']} problems together, as in the "
            f"run that wrote the checkpoint, got {evaluation.round_size}: use the same settings"
        )
    evaluation.requested, evaluation.current = deque(saved["asked"]), saved["current"]
    evaluation.begun = saved["begun"]
    evaluation.results = [_load_result(result) for result in saved["results"]]
    _fill_leases(evaluation.leases, saved["evaluation"], task_sampler=evaluation.task_sampler, shift=0)


def _dump_leases(leases: LeaseTable) -> dict[str, Any]:
    return {
        "tasks": _plain(leases.tasks),
        "rollouts": _plain(leases.rollouts),
        "last_attempt": leases.last_attempt,
        "waiting": [task.number for _, _, task in leases.waiting if task.number not in leases.carried],
        "running": [
            *((number, lease.task.size) for number, lease in leases.running.items()),
            *((number, arrived.size) for number, arrived in leases.carried.items()),
        ],
        "complete": [
            (group.number, group.attempt, [_plain(r) for r in group.rollouts]) for group in leases.complete.values()
        ],
        **{name: getattr(leases, name) for name in COUNTERS},
    }


def _fill_leases(leases: LeaseTable, saved: dict[str, Any], *, task_sampler: TaskSampler, shift: int) -> None:
    leases.tasks, leases.rollouts = _load_ledger(saved["tasks"]), _load_ledger(saved["rollouts"])
    for number in saved["waiting"]:
        leases.enqueue(task_sampler.task(number), attempt=leases.first_attempt)
    for number, size in saved["running"]:
        leases.rollouts.drop("resume", size)
        leases.enqueue(task_sampler.task(number), attempt=leases.first_attempt)
    for number, attempt, rollouts in saved["complete"]:
        shifted = tuple(_shift_versions(Rollout(**rollout), shift) for rollout in rollouts)
        leases.complete[number] = CompletedGroup(number=number, attempt=attempt, rollouts=shifted)
    for name in COUNTERS:
        setattr(leases, name, saved[name])


def _load_result(saved: dict[str, Any]) -> Evaluated:
    """A result without the results of single problems.

    States of older releases contain them, but the learner received them before it requested the state.
    """
    scores = tuple(BenchmarkScore(**score) for score in saved["benchmarks"])
    return without_problem_results(Evaluated(**saved | {"benchmarks": scores}))


def _load_ledger(saved: dict[str, Any]) -> Ledger:
    return Ledger(saved["dispatched"], saved["trained"], Counter(saved["dropped"]))


def _shift_versions(rollout: Rollout, shift: int) -> Rollout:
    versions = rollout.versions
    return replace(rollout, versions=np.where(versions == OBSERVED, versions, versions + np.int32(shift)))


def _plain(record: Rollout | Ledger) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _pack_array(value: object) -> msgpack.ExtType:
    assert isinstance(value, np.ndarray), value
    return msgpack.ExtType(DTYPES.index(value.dtype.str), value.tobytes())


def _unpack_array(code: int, data: bytes) -> np.ndarray:
    return np.frombuffer(data, DTYPES[code])
