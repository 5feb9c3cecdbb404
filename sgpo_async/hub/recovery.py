"""The core of a killed hub, rebuilt from its journal.

    recover ─┬─ no journal, or one of another run ─▶ a new core
             └─ state + entries ── replay ─▶ the core as it was at the last commit ── HubRestarted ─▶ it goes on

`HubCore.handle` is deterministic, so replaying the events at their times gives the same state. Their effects are not
carried out again: they were carried out already, or their receivers ask again. The core's clock continues from the last
entry, so no timeout expires while there is no hub.

The saved state is a pickle of the core, with references in place of what can be built again (configuration, problems,
tasks) and of rollouts, which the journal has written already. Unpickling is as safe as the run's folder, which only the
hub's user can write. A pickle of another release is not loaded.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import msgpack
import xxhash

from sgpo_async import __version__
from sgpo_async.config import Run, to_plain
from sgpo_async.hub import events as ev
from sgpo_async.hub.core import HubCore
from sgpo_async.hub.journal import FORMAT, Journal
from sgpo_async.hub.rollout_files import ANY_SIZE, Place, RolloutFiles
from sgpo_async.tasks.task_sampler import Task, TaskSampler
from sgpo_async.wire import decode, encode
from sgpo_async.wire.records import PROTOCOL, Rollout, without_secrets

_PLAIN_EVENTS: dict[str, Callable[..., ev.Event]] = {
    kind.__name__: kind
    for kind in (
        ev.Rejected,
        ev.Forbidden,
        ev.SenderUp,
        ev.SenderDown,
        ev.Disconnected,
        ev.Expelled,
        ev.Tick,
        ev.HubRestarted,
        ev.Interrupted,
    )
}


def recover(core: HubCore, journal: Journal) -> tuple[HubCore, float]:
    """The core that `journal` holds, and the time on its clock; `core`, a new one, if the journal is empty.

    A journal of another release or of other settings, or of an interrupted run, is emptied: its run is over.
    Raises HubError.
    """
    maker = _maker(core.run)
    if journal.get("maker") == maker:
        recovered, now = _replay(core, journal)
        if not recovered.interrupted:
            return recovered, now
    journal.clear()
    journal.set("maker", maker)
    save(core, journal)
    return core, 0.0


def load_state(core: HubCore, journal: Journal, name: str = "state") -> HubCore:
    """The core that was saved under `name`; `core`, a new one, has what is not in the journal. Raises HubError."""
    state = journal.get(name)
    assert state is not None, "the first save sets it together with the maker"
    with journal.reported():
        saved: HubCore = _Unpickler(state, core.run, core.training.task_sampler, journal.rollouts).load()
    return saved


def _replay(core: HubCore, journal: Journal) -> tuple[HubCore, float]:
    core = load_state(core, journal)
    now = core.now
    for now, body in journal.entries():
        with journal.reported():
            event = read_event(body, journal.rollouts)
        core.handle(event, now)
    return core, now


def save(core: HubCore, journal: Journal) -> None:
    """Save the state of the core, so that a restart need not replay the events that led to it."""

    def dump() -> tuple[bytes, set[Place]]:
        file = io.BytesIO()
        pickler = _Pickler(file, journal.rollouts)
        pickler.dump(core)
        return file.getvalue(), pickler.places

    journal.save(dump)


def _maker(run: Run) -> bytes:
    """Identifies the release and the settings. The address may differ: a restarted hub can get another port."""
    settings = to_plain(run)
    settings["hub"]["address"] = ""
    return bytes(msgpack.packb([__version__, PROTOCOL, FORMAT, xxhash.xxh3_64_hexdigest(repr(settings).encode())]))


class _Pickler(pickle.Pickler):
    """Pickles a core with references in place of what a new hub builds again, and of rollouts."""

    def __init__(self, file: io.BytesIO, rollouts: RolloutFiles) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._rollouts = rollouts
        self.places: set[Place] = set()  # of all rollouts of the core

    def persistent_id(self, value: object) -> tuple[str, Any] | None:
        match value:
            case Run():
                return "run", None
            case TaskSampler():
                return "task_sampler", None
            case Task():
                return "task", value.number
            case Rollout() if len(value.tokens):  # evaluation keeps rollouts without tokens, which are small
                place = self._rollouts.place_of(value)
                self.places.add(place)
                return "rollout", place
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, state: bytes, run: Run, task_sampler: TaskSampler, rollouts: RolloutFiles) -> None:
        super().__init__(io.BytesIO(state))
        self._run, self._task_sampler, self._rollouts = run, task_sampler, rollouts

    def persistent_load(self, reference: tuple[str, Any]) -> object:
        match reference:
            case "run", _:
                return self._run
            case "task_sampler", _:
                return self._task_sampler
            case "task", number:
                return self._task_sampler.task(number)
            case "rollout", place:
                return self._rollouts.read(place)
        raise pickle.UnpicklingError(f"unknown reference {reference!r}")


# ---- events


def write_event(journal: Journal, event: ev.Event, *, at: float, frames: Sequence[bytes] = ()) -> None:
    """Append an event that happened at time `at`.

    `frames` are the frames of a received message, unchanged; the hub's own messages, such as those of
    `learner_weights`, have none. Secrets are left out: a hub that starts again needs none of them.
    """
    match event:
        case ev.Received(member, Rollout() as rollout):
            place = journal.add_rollout(rollout, frames)
            journal.append(at, bytes(msgpack.packb(["Rollout", member, place])), place=place)
        case ev.Received(member, message):
            shown = without_secrets(message)
            written = list(frames) if frames and shown is message else encode(shown)
            journal.append(at, bytes(msgpack.packb(["Received", member, written])))
        case _:
            journal.append(at, bytes(msgpack.packb([type(event).__name__, *astuple(without_secrets(event))])))


def read_event(body: bytes, rollouts: RolloutFiles) -> ev.Event:
    """An event that `write_event` has written."""
    kind, *values = msgpack.unpackb(body)
    match kind, values:
        case "Rollout", [member, [number, offset, sizes]]:
            return ev.Received(member, rollouts.read((number, offset, tuple(sizes))))
        case "Received", [member, frames]:
            return ev.Received(member, decode(frames, max_bytes=ANY_SIZE))
    return _PLAIN_EVENTS[kind](*values)
