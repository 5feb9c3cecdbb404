"""Signals to the learner and to the hub: a checkpoint of the last step, one line, and a command that goes on."""

import shlex
import signal
from pathlib import Path

import pytest
from run_support import RealRun, RunProcess, assert_all_trained, free_port, rank_of, real_run, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(1500)]
TOTAL = 14


def interruption(learner: RunProcess) -> str:
    """The one line of an interrupted learner; no rank prints a traceback of its own."""
    lines = [line for line in learner.output.splitlines() if "interrupted after step" in line and "to go on" in line]
    (line,) = [line for line in lines if "traceback :" not in line]  # torchrun's report, if a rank has failed
    assert "sgpo_async/learner" not in learner.output
    return line


def reached(run: RealRun) -> int:
    """The step of the only checkpoint, which is the last step that was trained."""
    (checkpoint,) = (run.folder / "checkpoints").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert run.metrics()[-1]["step"] == step
    return step


def assert_goes_on(run: RealRun, line: str, name: str = "again") -> RunProcess:
    """The command in the line trains to the end of TOTAL more steps, and nothing counts twice."""
    last = reached(run)
    steps = last + TOTAL
    command = shlex.split(line.partition("to go on")[2].partition(": ")[2])
    assert command[-1] == "learner.resume=true"
    again = run.start(name, *command[1:], f"steps={steps}")
    assert again.wait() == 0, again.output
    assert [line["step"] for line in run.metrics()] == list(range(1, steps + 1))
    assert_all_trained(run.summary()["ledger"], tasks=steps * 4, size=run.settings.rollout.size)
    return again


@pytest.mark.parametrize(
    "who",
    ["one rank, SIGTERM", *(pytest.param(who, marks=pytest.mark.slow) for who in ("torchrun, Ctrl-C", "all, SIGTERM"))],
)
def test_a_signal_to_a_learner_with_its_own_hub(tmp_path: Path, who: str) -> None:
    """A job manager signals torchrun and all its ranks; the actors are told that the run is over."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with real_run(tmp_path, "steps=1000", f"hub.address={address}") as run:
        learner, actor = run.learner(), run.actor("actor", hub=address)
        until(run.metrics, "the first step")
        ranks = [rank_of(learner, number, attempt=0) for number in range(2)]
        number = signal.SIGINT if "Ctrl-C" in who else signal.SIGTERM
        for process in {"torchrun": [], "one": ranks[1:], "all": ranks}[who.partition(" ")[0].rstrip(",")]:
            process.send_signal(number)
        if not who.startswith("one"):
            learner.process.send_signal(number)
        assert learner.wait() != 0
        assert actor.wait() == 0, actor.output
        run.assert_cleaned_up()
        line = interruption(learner)
        assert f"interrupted after step {reached(run)}: learner rank " in line and f"received {number.name};" in line
        if who.startswith("torchrun"):
            second = run.actor("second", hub=address)
            assert_goes_on(run, line)
            assert second.wait() == 0
            run.assert_cleaned_up()


@pytest.mark.slow
def test_a_signal_to_a_learner_beside_a_hub(tmp_path: Path) -> None:
    """Hub and actor live on; the learner goes on with them."""
    with real_run(tmp_path, "steps=1000", "hub.address=tcp://127.0.0.1:0") as run:
        hub, actor = run.hub(), run.actor("actor")
        learner = run.learner("--hub", run.address())
        until(run.metrics, "the first step")
        learner.process.send_signal(signal.SIGTERM)
        assert learner.wait() != 0
        line = interruption(learner)
        assert hub.process.poll() is None and actor.process.poll() is None
        step = reached(run)
        hub.process.send_signal(signal.SIGINT)
        assert (hub.wait(), actor.wait()) == (130, 0)
        assert "waiting up to" not in hub.output, "there is no learner that could write a checkpoint"
        assert f"interrupted after step {step}: learner rank " in line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_hub_ends_the_learner(tmp_path: Path, number: signal.Signals) -> None:
    """The learner writes a checkpoint first, and names the hub and the reason in one line, the last one of torchrun."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with real_run(tmp_path, "steps=1000", f"hub.address={address}") as run:
        hub, actor = run.hub(), run.actor("actor", hub=address)
        learner = run.learner("--hub", address)
        until(run.metrics, "the first step")
        hub.process.send_signal(number)
        assert (hub.wait(), actor.wait()) == (128 + number, 0), hub.output
        assert learner.wait() != 0
        run.assert_cleaned_up()
        line = f"hub {address}: interrupted after step {reached(run)}: the hub received {number.name}; "
        line += "to go on, start the hub again, then: "
        (error,) = [one for one in learner.output.splitlines() if one.startswith("error: ")]
        assert error.startswith(f"error: {line}")
        assert f"traceback : {line}" in learner.output, "what torchrun reports as the root cause"
        if number == signal.SIGINT:
            steps = reached(run) + TOTAL
            hub, actor = run.hub(f"steps={steps}"), run.actor("second", hub=address)
            assert_goes_on(run, error)
            assert (hub.wait(), actor.wait()) == (0, 0)
            run.assert_cleaned_up()


@pytest.mark.slow
def test_a_hub_that_is_killed_while_it_ends_costs_the_checkpoint_but_no_time(tmp_path: Path) -> None:
    """A second Ctrl-C ends the hub at once; the learner, stopped here meanwhile, does not wait for its answers."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with real_run(tmp_path, "steps=1000", f"hub.address={address}") as run:
        hub = run.hub()
        run.actor("actor", hub=address)
        learner = run.learner("--hub", address, ranks=1)
        until(run.metrics, "the first step")
        rank = rank_of(learner, 0, attempt=0)
        rank.suspend()
        hub.process.send_signal(signal.SIGINT)
        until(lambda: "waiting up to 30 s until the learner has written a checkpoint" in hub.output, "the hub waits")
        hub.process.send_signal(signal.SIGINT)
        assert hub.wait() == 130
        rank.resume()
        assert learner.wait() != 0
        (error,) = [one for one in learner.output.splitlines() if one.startswith("error: ")]
        assert "the hub received SIGINT" in error


def test_a_signal_before_the_first_step_ends_the_learner_at_once(tmp_path: Path) -> None:
    """There is no actor, so it waits for its first batch."""
    with real_run(tmp_path, "hub.address=tcp://127.0.0.1:0") as run:
        run.hub()
        learner = run.learner("--hub", run.address(), ranks=1)
        until(lambda: run.status()["learner"]["requested"], "the request of the first batch")
        learner.process.send_signal(signal.SIGTERM)
        assert learner.wait() != 0
        assert "interrupted before the first step: learner rank 0 received SIGTERM; there is no" in learner.output
        assert not (run.folder / "checkpoints").exists() or not list((run.folder / "checkpoints").glob("step-*"))
