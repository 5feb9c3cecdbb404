"""The scripts for Slurm, by a real Slurm on loopback: a whole run, more actors, a killed hub, a requeue, its end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback_slurm import Slurm, loopback_slurm, why_not
from run_support import MARK, ROOT, SMALL, RealRun, assert_all_trained, free_port, real_run, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(1800), pytest.mark.skipif(bool(why_not()), reason=why_not())]
SCRIPTS = ROOT / "launch/cluster/slurm"
NODES = 6  # as run.sbatch asks for


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with loopback_slurm(NODES) as started:
        yield started


class Job:
    """A submitted run of demo size, with two learner nodes of one rank and two inference nodes."""

    def __init__(self, slurm: Slurm, run: RealRun, folder: Path, *settings: str) -> None:
        self.slurm, self.run, self.log = slurm, run, folder / "job.log"
        self.keys = folder / "keys"
        self.environment = {
            "VENV": str(ROOT / ".venv"),
            "KEYS": str(self.keys),
            "OUT": str(run.folder.parent),
            "NAME": "run",
            "PORT": str(free_port()),
            "RENDEZVOUS_PORT": str(free_port()),
            "RANKS": "1",
            "ACTOR_OPTIONS": "--device cpu",
            "OMP_NUM_THREADS": "1",
            MARK: run.mark,
        }
        script = folder / "run.sbatch"
        script.write_text((SCRIPTS / "run.sbatch").read_text().replace("--nodes=4", "--nodes=2"))
        words = [str(script), "configs/demo.yaml", *SMALL, *settings]
        self.id = self.submit(f"--output={self.log}", *words)

    def submit(self, *words: str) -> str:
        return self.slurm.call("sbatch", "--parsable", *words, cwd=ROOT, **self.environment).strip()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def steps(self) -> list[int]:
        return [line["step"] for line in self.run.metrics()]

    def more_steps(self, what: str) -> None:
        """Wait for training that has begun after now."""
        reached = len(self.steps())
        until(lambda: len(self.steps()) > reached + 3, f"steps {what}; {self.output[-3000:]}", seconds=300)

    def wait(self, state: str) -> None:
        until(
            lambda: self.slurm.state(self.id) == state, f"{state} of job {self.id}; {self.output[-3000:]}", seconds=300
        )


def test_slurm_accepts_the_scripts_as_they_are(slurm: Slurm) -> None:
    for name in ("run", "actors"):
        answer = slurm.call("sbatch", "--test-only", str(SCRIPTS / f"{name}.sbatch"), cwd=ROOT)
        assert "to start at" in answer, answer


@pytest.mark.slow
def test_a_run_ends_with_its_job(slurm: Slurm, tmp_path: Path) -> None:
    with real_run(tmp_path / "out") as run:
        job = Job(slurm, run, tmp_path, "steps=12")
        job.wait("COMPLETED")
        assert job.steps() == list(range(1, 13))
        summary = run.summary()
        assert (summary["world_size"], summary["actors"]) == (2, 2)
        assert_all_trained(summary["ledger"], tasks=12 * 4, size=run.settings.rollout.size)
        assert not (job.keys.stat().st_mode & 0o077)
        run.assert_cleaned_up()


@pytest.mark.slow  # two minutes, most of which Slurm waits before it starts a requeued job
def test_actors_come_and_go_a_killed_hub_returns_and_a_requeued_job_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    with real_run(tmp_path / "out") as run:
        job = Job(slurm, run, tmp_path, "steps=100000")
        until(job.steps, "the first step", seconds=300)

        log = tmp_path / "actors.log"
        more = job.submit(f"--output={log}", "--array=1", str(SCRIPTS / "actors.sbatch"))
        until(lambda: log.exists() and "joined the run" in log.read_text(), "a third actor")
        job.more_steps("with a third actor")
        slurm.call("scancel", f"{more}_1")
        until(lambda: slurm.state(f"{more}_1") in ("", "CANCELLED"), f"end of the third actor: {log.read_text()}")
        assert "leaves: stopped" in log.read_text() and "has left: stopped" in job.output

        (hub,) = [process for process in run.processes_with("hub") if "python" in Path(process.exe()).name]
        hub.send_signal(signal.SIGKILL)
        until(lambda: "the hub has restarted at step" in job.output, "the next hub")
        job.more_steps("with the next hub")

        slurm.call("scancel", "--batch", "--signal=USR1", job.id)
        until(lambda: "interrupted after step" in job.output, "the checkpoint before the requeue", seconds=300)
        reached = int(job.output.rpartition("interrupted after step ")[2].partition(":")[0])
        until(lambda: job.steps()[-1] > reached, f"steps after the requeue; {job.output[-3000:]}", seconds=300)
        assert "Restarts=1" in slurm.call("scontrol", "show", "job", job.id)
        assert job.steps() == list(range(1, len(job.steps()) + 1)), "it went on from the checkpoint"

        slurm.call("scancel", "--signal=TERM", job.id)
        job.wait("FAILED")
        assert job.output.count("received SIGTERM: writing a checkpoint") > 2, "both learners, twice"
        checkpoints = sorted(run.folder.glob("checkpoints/step-*"))
        assert int(checkpoints[-1].name.removeprefix("step-")) == job.steps()[-1]
        run.assert_cleaned_up()
