"""How a run's files reach a tracker: each step once, also after failures, restarts and a resumed run; no secrets."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from synthetic_metrics import synthetic_lines, write_lines

from sgpo_async.cli.resources import installed, trackers
from sgpo_async.config import load, to_yaml
from sgpo_async.config.schema import TRACKERS, Hub, Learner, Run
from sgpo_async.errors import CheckFailed, ConfigError
from sgpo_async.files import JsonLinesWriter
from sgpo_async.metrics.trackers import process
from sgpo_async.metrics.trackers.base import COLUMNS, About, State, redacted, state_file, without_secrets
from sgpo_async.metrics.trackers.follow import Follower, rows_of, sole_writer

LINES = synthetic_lines(6)


class Notebook:
    """A tracker that keeps what it is told, and fails `failures` times at the step `fails_at`."""

    note = ""

    def __init__(self, *, fails_at: int = 0, failures: int = 0) -> None:
        self.steps: list[int] = []
        self.tables: list[int] = []
        self.final: Mapping[str, float] = {}
        self.closed: list[bool] = []
        self.opened: list[About] = []
        self._fails_at, self._failures = fails_at, failures

    def __call__(self, kind: str, about: About) -> "Notebook":
        """Open it."""
        self.opened.append(about)
        self.state = replace(about.state, id="note-1")
        return self

    def step(self, step: int, values: Mapping[str, float], counts: Mapping[str, Mapping[int, float]]) -> None:
        assert all("/" in name for name in [*values, *counts])
        if step == self._fails_at and self._failures:
            self._failures -= 1
            raise OSError("no\nnetwork at https://me:word@host/")
        self.steps.append(step)

    def samples(self, step: int, rows: Sequence[Sequence[Any]]) -> None:
        assert all(len(row) == len(COLUMNS) for row in rows)
        self.tables.append(step)

    def summary(self, values: Mapping[str, float]) -> None:
        self.final = values

    def close(self, *, finished: bool) -> None:
        self.closed.append(finished)


def follower(folder: Path, notebook: Notebook) -> Follower:
    return Follower("wandb", folder, notebook)


def test_new_lines_are_written_as_they_come_and_the_summary_at_the_end(tmp_path: Path) -> None:
    notebook = Notebook()
    write_lines(tmp_path, LINES[:2])
    follow = follower(tmp_path, notebook)
    assert follow.advance() and notebook.steps == [1, 2]
    lines = JsonLinesWriter(tmp_path / "metrics.jsonl")
    for line in LINES[2:]:
        lines.append(line)
    (tmp_path / "summary.json").write_text('{"steps": 6, "ledger": {"trained": 3}, "objective": "sgpo"}')
    follow.finish(finished=True)
    assert notebook.steps == [1, 2, 3, 4, 5, 6] and notebook.closed == [True]
    assert notebook.final == {"steps": 6, "ledger/trained": 3}
    assert follow.missing() == follow.failures == 0 and len(notebook.opened) == 1


def test_a_failure_is_counted_and_the_step_is_written_later(tmp_path: Path) -> None:
    notebook = Notebook(fails_at=3, failures=2)
    write_lines(tmp_path, LINES)
    follow = follower(tmp_path, notebook)
    assert not follow.advance()
    assert follow.failure == "OSError: no network at https://***@host/"
    assert follow.missing() == 4
    assert not follow.advance() and follow.failures == 1, "not again within a second"
    assert not follow.advance(at_once=True) and follow.failures == 2
    follow.finish(finished=False)
    assert notebook.steps == [1, 2, 3, 4, 5, 6] and notebook.closed == [False]
    assert len(notebook.opened) == 3
    assert State.read(state_file(tmp_path, "wandb")) == State(id="note-1", step=6, failures=2)


def test_a_tracker_that_always_fails_leaves_what_is_missing(tmp_path: Path) -> None:
    notebook = Notebook(fails_at=5, failures=99)
    write_lines(tmp_path, LINES)
    follow = follower(tmp_path, notebook)
    follow.advance()
    follow.finish(finished=True)
    assert (follow.missing(), follow.failures, notebook.closed) == (2, 2, [])


def test_a_resumed_run_goes_on_with_the_same_id_and_no_step_twice(tmp_path: Path) -> None:
    """It resumes from step 3, and trains step 4 again, which the tracker has already."""
    notebook = Notebook()
    write_lines(tmp_path, LINES[:4])
    follower(tmp_path, notebook).finish(finished=False)
    write_lines(tmp_path, LINES[:3])
    resumed = follower(tmp_path, notebook)
    resumed.advance()
    write_lines(tmp_path, LINES)  # another file of this name
    resumed.finish(finished=True)
    assert notebook.steps == [1, 2, 3, 4, 5, 6]
    assert notebook.opened[1].state.id == "note-1"


def sample_of(step: int) -> dict[str, Any]:
    rollout = {"reward": 1.0, "correct": True, "tokens": 3, "text": "x" * 9999, "versions": [3, -1]}
    rollouts = [rollout | {"guided": slot > 4} for slot in range(8)]
    return {"step": step, "task": 17, "problem": "p" * 9999, "rollouts": rollouts}


def test_a_few_completions_go_along_after_each_evaluation(tmp_path: Path) -> None:
    write_lines(tmp_path, LINES)
    (tmp_path / "config.yaml").write_text("evaluation: {every: 10}")
    with (tmp_path / "samples.jsonl").open("w") as file:
        for step in (1, 2, 9, 10, 11, 23, 25):
            print(json.dumps(sample_of(step)), file=file)
    notebook = Notebook()
    follow = follower(tmp_path, notebook)
    follow.advance()
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample_of(1)) + "\n" + json.dumps(sample_of(31)) + "\n")
    follow.finish(finished=True)
    assert notebook.tables == [1, 10, 23, 31]


def test_a_table_has_two_completions_of_each_kind_and_bounded_texts() -> None:
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows_of(sample_of(4))]
    assert [row["strategy"] for row in rows] == [False, False, True, True]
    assert all(len(row["completion"]) == len(row["problem"]) == 2000 for row in rows)
    assert (rows[0]["step"], rows[0]["task"], rows[0]["version"]) == (4, 17, 3)


def test_trackers_see_the_configuration_without_secrets(tmp_path: Path) -> None:
    notebook = Notebook()
    write_lines(tmp_path, LINES)
    hub = Hub(weight_folder="s3://id:word@bucket/run")
    (tmp_path / "config.yaml").write_text(to_yaml(replace(Run(), name="mine", learner=Learner(project="p"), hub=hub)))
    follower(tmp_path, notebook).advance()
    (about,) = notebook.opened
    assert (about.name, about.project) == ("mine", "p")
    assert about.config["rollout"]["max_new_tokens"] == 64
    assert about.config["hub"]["weight_folder"] == "s3://***@bucket/run"
    given = {
        "url": "s3://id:word@bucket/x",
        "api_key": "abc",
        "max_new_tokens": 4,
        "list": ["http://a:b@c"],
        "keys": "k/",
    }
    seen = {"url": "s3://***@bucket/x", "api_key": "***", "max_new_tokens": 4, "list": ["http://***@c"], "keys": "k/"}
    assert without_secrets(given) == seen


def test_values_of_secret_variables_do_not_appear_in_failures() -> None:
    environment = {"WANDB_API_KEY": "0123456789abcdef", "X_PASSWORD": "short", "HOME": "/root/somewhere"}
    text = "403 for 0123456789abcdef at /root/somewhere, short"
    assert redacted(text, environment) == "403 for *** at /root/somewhere, short"


def test_only_one_process_writes_to_a_tracker(tmp_path: Path) -> None:
    with (
        sole_writer(tmp_path, "wandb", patience_s=0) as first,
        sole_writer(tmp_path, "wandb", patience_s=0) as second,
        sole_writer(tmp_path, "mlflow", patience_s=0) as other,
    ):
        assert (first, second, other) == (True, False, True)
    with sole_writer(tmp_path, "wandb", patience_s=0) as third:
        assert third


def test_the_process_of_a_tracker_that_another_one_writes_ends_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = io.StringIO()
    monkeypatch.setattr(process, "END_S", 0.0)
    monkeypatch.setattr(process, "_own_output", lambda: told)
    monkeypatch.setattr("os.nice", lambda _: 0)
    monkeypatch.setattr("sys.argv", ["process", "tensorboard", str(tmp_path)])
    with sole_writer(tmp_path, "tensorboard", patience_s=0), pytest.raises(SystemExit) as ended:
        process.main()
    assert ended.value.code == 1
    assert json.loads(told.getvalue()) == {"event": "failed", "text": f"another process writes {tmp_path} to it"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "[wandb,tensorbord]",
            "must be one of tensorboard, wandb, mlflow, got 'tensorbord'; did you mean tensorboard?",
        ),
        ("[WandB]", "must be one of tensorboard, wandb, mlflow, got 'WandB'; did you mean wandb?"),
        ("[zzz]", "must be one of tensorboard, wandb, mlflow, got 'zzz'"),
        ("[mlflow,mlflow]", "must name each tracker once, got 'mlflow'"),
    ],
)
def test_an_unknown_tracker_is_refused_with_the_nearest_name(value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("", [f"learner.trackers={value}"])
    assert str(caught.value).endswith(f"learner.trackers {message}")


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "absent").mkdir()  # no package: W&B leaves such a folder where it runs
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckFailed) as caught:
        installed("absent", "learner.trackers")
    assert str(caught.value) == (
        "learner.trackers: absent needs the package absent, which is not installed; "
        "pip install 'sgpo-async[absent]', or leave absent out"
    )
    assert trackers(replace(Run(), learner=Learner(trackers=[]))) == "none"
    assert trackers(Run()) == "tensorboard" and Run().learner.trackers[0] in TRACKERS
