"""`launch/local.py` as a user runs it: Ctrl-C, and problems from a file."""

import json
import shlex
import signal
import time
from pathlib import Path

import pytest
from run_support import chat_model, real_run, until

from sgpo_async.model.folder import load_tokenizer

pytestmark = pytest.mark.process


def test_ctrl_c_writes_a_checkpoint_and_ends_all_processes(tmp_path: Path) -> None:
    """The line at the end is a command, with which the run goes on. The batches are trained in parts."""
    with real_run(tmp_path, "steps=1000", "learner.parts=2") as run:
        local = run.local()
        until(run.metrics, "the first step")
        assert len(run.processes()) >= 10  # local, watchdog, hub, torchrun, 2 ranks, 2 actors, 2 weight senders, ...
        began = time.monotonic()
        local.process.send_signal(signal.SIGINT)
        assert local.wait() == 130
        run.assert_cleaned_up()
        print(f"all processes ended {time.monotonic() - began:.1f} s after Ctrl-C")
        assert "Traceback" not in local.output and "stopping" in local.output
        assert "waiting up to 40 s for the learner, which finishes its step and writes a checkpoint" in local.output
        reached = run.metrics()[-1]["step"]
        last = local.output.splitlines()[-1]
        assert last.startswith(f"to go on from the checkpoint of step {reached}: ")
        command = shlex.split(last.partition(": ")[2])
        assert command[1] == "launch/local.py" and command[-1] == "learner.resume=true"
        again = run.start("again", *command[1:], f"steps={reached + 2}")
        assert again.wait() == 0, again.output
        assert [line["step"] for line in run.metrics()] == list(range(1, reached + 3))
        run.assert_cleaned_up()


def test_a_run_that_must_resume_without_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    with real_run(tmp_path) as run:
        run.folder.mkdir()
        (run.folder / "metrics.jsonl").write_text('{"step": 1}\n')
        local = run.local("learner.resume=true")
        assert local.wait() == 2
        (line,) = local.output.splitlines()
        assert line.startswith(f"error: learner.resume=true: {run.folder}/checkpoints has no checkpoint; ")
        assert [path.name for path in run.folder.iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_a_run_trains_on_problems_from_a_file(tmp_path: Path) -> None:
    """The policy knows only the digits of the chat prompts and solves nothing; the run works nevertheless."""
    problems = tmp_path / "sums.jsonl"
    with problems.open("w") as file:
        for number in range(24):
            problem = {"problem": f"What is {' '.join(str(number))} + 777000?", "answer": str(777000 + number)}
            strategy = {"strategy": "Add the ones, then the tens."} if number % 2 else {}
            print(json.dumps(problem | strategy), file=file)
    overrides = ("steps=2", "local.actors=1", "local.ranks=1", "tasks.source=file", f"tasks.path={problems}")
    with real_run(tmp_path, *overrides, "tasks.prompt=chat") as run:
        model = chat_model(tmp_path / "model")
        local = run.local(f"model.path={model}", "rollout.max_new_tokens=8")
        assert local.wait() == 0, local.output
        run.assert_cleaned_up()
        lines = run.metrics()
        for line in lines:
            zero = ("pass_auto", "pass_guided", "alpha", "loss", "grpo_loss", "kd_loss")
            assert {name: line[name] for name in zero} == dict.fromkeys(zero, 0)
            assert line["kl_mean"] is None  # nothing to distil
        assert lines[-1]["eval_pass_auto"] == 0  # the last step waits for its evaluation; the first step does not
        ledger = run.summary()["ledger"]
        assert ledger["trained"] == 2 * 4
        assert ledger["rollouts"]["trained"] < 2 * 4 * 12  # a problem without a strategy has no guided rollouts
        assert load_tokenizer(str(run.folder / "policy")).chat_template


@pytest.mark.slow
def test_actors_that_are_told_to_leave_are_missed_at_once_and_may_be_replaced(tmp_path: Path) -> None:
    """SIGTERM to all; the learner waits for a batch, and an actor from elsewhere goes on."""
    with real_run(tmp_path, "steps=6", "hub.address=tcp://127.0.0.1:0") as run:
        local = run.local()
        until(run.metrics, "training")
        actors = run.processes_with("actor", "--name")
        assert len(actors) == 2
        for actor in actors:
            actor.terminate()
        until(lambda: "no actor is left: the learner waits 600 s for a batch" in local.output, "a line at once")
        other = run.actor("other")
        assert (local.wait(), other.wait()) == (0, 0), local.output
        assert run.summary()["steps"] == 6
        assert local.output.count("no actor is left") == 1
        run.assert_cleaned_up()
