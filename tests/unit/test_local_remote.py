"""`sgpo-async watch`: what it shows of what the hub says, and when it ends."""

import io
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_support import Driver, make_run, train_one_step
from rich.console import Console

from sgpo_async.config import Run, to_plain
from sgpo_async.errors import HubError
from sgpo_async.files import write_whole
from sgpo_async.hub import events as ev
from sgpo_async.local.follow import Follow
from sgpo_async.local.hub_rows import hub_rows
from sgpo_async.local.live import render
from sgpo_async.local.remote import FIRST_S, GONE_S, check_answers, phase_of, unknown, view_of
from sgpo_async.local.watch import Watch

ADDRESS = "tcp://10.0.0.1:5757"


def trained() -> Driver:
    """A hub that has trained one step."""
    hub = Driver(make_run(steps=5))
    hub.learner()
    hub.actor(b"a", credit=3)
    hub.core.actors[b"a"].state = "serving"
    train_one_step(hub)
    return hub


def watching(status: dict[str, Any] | None, *, now: float = 100.0) -> Watch:
    watch = Watch(None, max_bytes=2**20)
    watch.settings = to_plain(Run(name="far", out="elsewhere"))
    if status is not None:
        watch._take(status, now)
    return watch


def picture(watch: Watch, *, width: int = 100, now: float = 100.0) -> str:
    console = Console(width=width, height=60, record=True, color_system=None, force_terminal=True, file=io.StringIO())
    console.print(render(view_of(watch, ADDRESS, now=now), width))
    return console.export_text()


def test_every_fact_of_the_status_is_shown() -> None:
    """A new key of the status must be shown, or named here with the place where it is shown."""
    elsewhere = {
        *("step", "steps", "buffer", "lag", "pass_auto", "pass_guided"),  # figures of every display
        *("tokens_per_s", "engine_idle", "evaluations", "closing"),
    }
    status = trained().core.status()
    status |= {"quarantined": {"bad": "3 invalid messages"}, "rejected_reasons": {"malformed": 2}, "rejected": 2}
    status |= {"canary_mean": 0.1, "canary_max": 0.2, "engine_waits": {"weights": 0.1, "leases": 0.2}}
    status |= {"last_rejection": "ab12: malformed", "stalled": "nothing has moved", "evaluating": 7}
    changed = []
    for key, value in status.items():
        others: dict[str, Any] = {"learner": {}, "ledger": {}, "evaluation_ledger": {}, "actors": []}
        other = others.get(key, "" if isinstance(value, str) else {} if isinstance(value, dict) else 987_654)
        if hub_rows(status) != hub_rows(status | {key: other}):
            changed.append(key)
    assert status.keys() - set(changed) == elsewhere
    text = picture(watching(status))
    for expected in ("far  training", "step 1/5", "a ", "1 joined", "bad", "nothing has moved", "measuring version 7"):
        assert expected in text, expected


def test_the_picture_says_what_the_hub_does_not_know() -> None:
    assert "the hub does not know loss, alpha, trainer idle and mismatch: see elsewhere/far" in picture(
        watching(trained().core.status())
    )
    assert "the run's folder" in unknown({})


def test_phases() -> None:
    hub = Driver(make_run(steps=5))
    assert phase_of(hub.core.status()) == "waiting for the learner"
    hub.learner()
    assert phase_of(hub.core.status()) == "waiting for actors"
    hub.actor(b"a", credit=3)
    assert phase_of(hub.core.status()) == "waiting for actors", "it has not said that it serves"
    hub.core.actors[b"a"].state = "serving"
    assert phase_of(hub.core.status()) == "first rollouts"
    train_one_step(hub)
    assert phase_of(hub.core.status()) == "training"
    hub.handle(ev.Interrupted("the hub received SIGTERM"))
    assert phase_of(hub.core.status()) == "ended: the hub received SIGTERM"
    assert phase_of({}) == "waiting for the learner"


@pytest.mark.parametrize("name", ["\x1b[31mred", "[bold]x", "a\nb", "漢" * 90])
def test_names_and_reasons_of_members_cannot_control_the_terminal(name: str) -> None:
    status = trained().core.status()
    status["actors"][0]["name"] = name
    status |= {"quarantined": {name: name}, "rejected_reasons": {name: 1}, "last_rejection": name, "stalled": name}
    status |= {"closing": name}
    watch = watching(status)
    watch.settings |= {"name": name, "out": name}
    for width in (60, 100):
        text = picture(watch, width=width)
        assert all(c.isprintable() or c == "\n" for c in text)
        assert ("[bold]x" in text) == ("[bold]" in name)


def test_the_pass_rates_of_the_steps_are_collected() -> None:
    watch = watching(None)
    for step, rate in ((0, None), (1, 0.1), (1, 0.1), (4, 0.3), (5, 0.4)):
        watch._take({"step": step, "pass_auto": rate, "pass_guided": 1.0}, 100.0)
    assert [(line["step"], line["pass_auto"]) for line in watch.history] == [(1, 0.1), (4, 0.3), (5, 0.4)]


def test_the_lines_of_the_learner_take_the_place_of_the_hubs(tmp_path: Path) -> None:
    """metrics.jsonl may come later than the hub's first answers, and a resumed learner writes it anew."""
    watch = Watch(tmp_path, max_bytes=2**20)
    status = {"step": 1, "pass_auto": 0.5, "uptime_s": 1000.0, "lag": {"mean": 1.5, "max": 2, "histogram": {"1": 3}}}
    watch._take(status, 100.0)
    assert watch.history[0]["pass_auto"] == 0.5 and watch.history[0]["lag_mean"] == 1.5
    for steps in ((1, 2), (1, 2, 3), (1,)):
        write_whole(tmp_path / "metrics.jsonl", "".join(f'{{"step": {step}, "loss": 0.1}}\n' for step in steps))
        watch._take(status | {"step": 9}, 100.0)
        watch.poll("")
        assert [line["step"] for line in watch.history] == [*steps]
        assert watch.metrics == {"step": steps[-1], "loss": 0.1}


def test_a_program_is_told_every_line_of_the_learner_once(tmp_path: Path) -> None:
    """Neither what the hub reports until metrics.jsonl exists, nor steps that a resumed learner trains again."""
    told: list[dict[str, Any]] = []
    run = make_run(steps=5)
    follow = Follow(replace(run, out=str(tmp_path)), lambda line: told.append(dict(line)))
    follow._watch._take({"step": 1, "pass_auto": 0.5}, 100.0)
    follow.close(stopping=False)
    assert not told
    for steps in ((1,), (1, 2, 3), (1, 2), (1, 2, 3, 4)):
        lines = "".join(f'{{"step": {step}, "loss": 0.1}}\n' for step in steps)
        write_whole(Path(replace(run, out=str(tmp_path)).folder) / "metrics.jsonl", lines)
        follow.close(stopping=False)
    assert told == [{"step": step, "loss": 0.1} for step in (1, 2, 3, 4)]


def test_files_of_an_earlier_run_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 70}\n')
    (tmp_path / "samples.jsonl").write_text('{"step": 70, "rollouts": []}\n')
    watch = Watch(tmp_path, max_bytes=2**20)
    watch.poll("")
    assert [line["step"] for line in watch.history] == [70] and watch.sample
    for path in tmp_path.iterdir():
        os.utime(path, (1e9, 1e9))
    watch._take({"step": 0, "uptime_s": 5.0}, 100.0)
    watch.poll("")
    assert not watch.history and not watch.metrics and watch.sample is None


def test_samples_that_are_written_anew_are_not_kept_twice(tmp_path: Path) -> None:
    watch = Watch(tmp_path, max_bytes=2**20)
    for steps in ((1, 2, 3, 4), (1, 3), (1, 3, 5)):
        write_whole(tmp_path / "samples.jsonl", "".join(f'{{"step": {n}, "rollouts": []}}\n' for n in steps))
        watch.poll("")
        assert [sample["step"] for sample in watch.samples] == [*steps]


def test_a_hub_that_never_answers_is_an_error() -> None:
    watch = watching(None)
    check_answers(watch, ADDRESS, began=100.0, now=100.0 + FIRST_S)
    assert "waiting for the hub at tcp://10.0.0.1:5757" in picture(watch)
    with pytest.raises(HubError, match=r"hub tcp://10.0.0.1:5757: no answer within 30 s; check that the hub runs"):
        check_answers(watch, ADDRESS, began=100.0, now=101.0 + FIRST_S)


def test_a_hub_that_is_gone_has_time_to_start_again() -> None:
    watch = watching(trained().core.status())
    check_answers(watch, ADDRESS, began=0.0, now=100.0 + GONE_S)
    assert "no answer from the hub for 9 s; it may start again" in picture(watch, now=109.0)
    assert "no answer" not in picture(watch, now=101.0)
    with pytest.raises(HubError, match=r"no answer for 60 s, the last one at step 1 of 5; the hub was killed") as error:
        check_answers(watch, ADDRESS, began=0.0, now=101.0 + GONE_S)
    assert "\n" not in str(error.value)


def test_figures_that_are_not_known_have_a_dash() -> None:
    rows = dict(hub_rows({}))
    assert rows["learner"] == "– of – ranks, 0 wait for a batch"
    assert rows["weights"] == "version –, published –"
    assert re.match(r"– joined, – left", rows["events"])


def test_what_each_engine_and_each_server_serves_is_shown() -> None:
    servers = [{"url": "http://one", "version": 7, "digest": "0123abcd", "canary": 0.25}]
    actors = [
        {"name": "embedded", "version": 8, "digest": "89abcdef", "canary": None, "servers": [], "source": "node"},
        {"name": "node", "version": 7, "digest": "0123abcd", "canary": 0.25, "servers": servers},
    ]
    rows = dict(hub_rows({"actors": actors}))
    assert rows["embedded"] == "version 8, digest 89abcdef, no canary, weights from node"
    assert rows["node http://one"] == "version 7, digest 0123abcd, canary 0.25 nats off"
