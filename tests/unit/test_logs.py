"""Logs have one line per event, readable or as JSON, with the name of the process."""

import json
import logging
from collections.abc import Iterator

import pytest

from sgpo_async import logs
from sgpo_async.cli.main import main

log = logging.getLogger("sgpo_async.somewhere")


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    package = logging.getLogger("sgpo_async")
    handlers, level = package.handlers, package.level
    yield
    package.handlers, package.level = handlers, level
    package.setLevel(level)


def test_the_human_format_has_time_name_and_the_level_of_warnings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    logs.set_up("actor", name="actor-0")
    log.info("engine ready after %.1f s", 3.14)
    log.warning("task %d: too long", 7)
    log.debug("below the level")
    first, second = capsys.readouterr().err.splitlines()
    assert first[8:] == " actor-0      engine ready after 3.1 s"
    assert second[8:] == " actor-0      warning: task 7: too long"


def test_the_json_format_has_role_rank_and_level(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv(logs.FORMAT, "json")
    monkeypatch.setenv(logs.LEVEL, "debug")
    logs.set_up("learner")
    log.debug("step %d", 1)
    try:
        raise ValueError("wrong")
    except ValueError:
        log.exception("it failed")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {"level": "DEBUG", "role": "learner", "name": "learner", "rank": 3, "message": "step 1"}
    assert second["message"] == "it failed" and "ValueError: wrong" in second["traceback"]


def test_fields_are_keys_in_json_and_not_shown_to_people(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("json", "human"):
        monkeypatch.setenv(logs.FORMAT, form)
        logs.set_up("hub")
        log.info("%s has joined", "a", extra=logs.fields(event="joined", actors=3))
    first, second = capsys.readouterr().err.splitlines()
    values = json.loads(first)
    assert (values["message"], values["event"], values["actors"], values["role"]) == (
        "a has joined",
        "joined",
        3,
        "hub",
    )
    assert second[8:] == " hub          a has joined"


def test_the_log_options_set_the_environment_for_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.FORMAT, "human")
    monkeypatch.setenv(logs.LEVEL, "info")
    assert main(["hub", "configs/demo.yaml", "--dry-run", "--log-format", "json", "--log-level", "debug"]) == 0
    import os

    assert (os.environ[logs.FORMAT], os.environ[logs.LEVEL]) == ("json", "debug")
