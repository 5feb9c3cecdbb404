"""What an actor passes on from the run's configuration to its weight receiver."""

from __future__ import annotations

from typing import Any

import pytest

from sgpo_async.actor import run as actor
from sgpo_async.config import load
from sgpo_async.weights import StoreFile


@pytest.mark.parametrize("deltas", ["auto", "always", "never"])
def test_the_weight_receiver_has_the_settings_of_the_run(deltas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    monkeypatch.setattr(actor, "WeightReceiver", lambda name, **settings: started.append({"name": name} | settings))
    options = actor.ActorOptions(hub="tcp://127.0.0.1:1", name="a-1")
    store = StoreFile("/nowhere")
    actor.Actor(options)._start_node(load("", [f"hub.weight_deltas={deltas}"]), store)
    (found,) = started
    assert found.pop("deadlines")
    assert found == {"name": "a-1", "store": store.path, "road": "rpc", "deltas": deltas, "pulls": True}
    store.close()
