"""The commands of the pods in launch/cluster/kubernetes, on loopback: hub, a learner of two nodes, two actors.

Addresses, GPUs and the model are replaced by those of a demo on CPUs; every other word is the file's. Each process has
the keys of its own Secret and no others. A node of the learner is evicted, and an actor scaled away.
"""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path

import psutil
import pytest
import yaml
from run_support import ROOT, SMALL, RealRun, RunProcess, assert_all_trained, free_port, real_run, until

from sgpo_async.transport.keys import create_keys
from tests.cluster_files import KUBERNETES, kubernetes_words

pytestmark = [pytest.mark.process, pytest.mark.timeout(1800)]
STEPS = 150


def start(run: RealRun, name: str, words: list[str]) -> RunProcess:
    """Start a command of the image, whose programs are modules here; it is started again as by `restartPolicy`."""
    program, *rest = words
    module = {"sgpo-async": "sgpo_async.cli", "torchrun": "torch.distributed.run"}[program]
    return run.start(name, "-m", module, *rest, prefix=["launch/cluster/again.sh"])


def evict(process: RunProcess) -> None:
    """End the command in this container by SIGTERM."""
    (inner,) = psutil.Process(process.process.pid).children()
    inner.send_signal(signal.SIGTERM)


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


class Cluster:
    """The commands with the values of this machine."""

    def __init__(self, folder: Path, shared: Path) -> None:
        self.folder, self.shared = folder, shared
        self.hub = f"127.0.0.1:{free_port()}"
        self.rendezvous = f"127.0.0.1:{free_port()}"
        create_keys(folder / "all")
        for secret in yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["secretGenerator"]:
            own = folder / secret["name"]
            own.mkdir()
            for file in secret["files"]:
                shutil.copy(folder / "all" / Path(file).name, own)

    def words(self, role: str, name: str = "") -> list[str]:
        values = {
            "sgpo-hub:5757": self.hub,
            "127.0.0.1:5757": self.hub,
            "sgpo-learner-0.sgpo-learner:29500": self.rendezvous,
            "out=/shared/runs": f"out={self.shared}",
            "out=/state": f"out={self.folder / 'state'}",
            "/keys": str(self.folder / f"sgpo-{role}-keys"),
            "--nproc-per-node=8": "--nproc-per-node=1",
            "--servers=8": "--device=cpu",
            "configs/paper-qwen2.5-7b.yaml": str(ROOT / "configs/demo.yaml"),
        }
        words = []
        for word in kubernetes_words(role, POD_IP="127.0.0.1", POD_NAME=name):
            for old, new in values.items():
                word = word.replace(old, new) if not word.startswith(("/", str(self.folder))) else word
            words.append(word)
        files = ("launch/cluster/cluster.yaml", str(KUBERNETES / "run.yaml"))  # a model and servers that are not here
        words = [word for word in words if word not in files and word != "--tp=1"]
        return [*words, *SMALL, f"steps={STEPS}", "name=run"] if role != "actor" else words


@pytest.mark.slow
def test_the_pods_make_a_run_that_survives_an_eviction(tmp_path: Path) -> None:
    with real_run(tmp_path / "out") as run:
        cluster = Cluster(tmp_path, run.folder.parent)
        hub = start(run, "hub", cluster.words("hub"))
        actors = [start(run, name, cluster.words("actor", name)) for name in ("sgpo-actor-0", "sgpo-actor-1")]
        first = start(run, "learner-0", cluster.words("learner"))
        until(lambda: listens(cluster.rendezvous), "the rendezvous at the first node")
        second = start(run, "learner-1", cluster.words("learner"))
        until(run.metrics, "the first step", seconds=300)

        evict(second)
        until(lambda: "starting it again" in second.output, "the end of the second node", seconds=300)
        assert "writing a checkpoint of step" in second.output and len(run.metrics()) < STEPS
        evict(actors[1])
        until(lambda: "leaves: stopped" in actors[1].output, "the second actor, which leaves")
        codes = [process.wait(300) for process in (first, second, hub, *actors)]
        assert codes == [0] * 5, first.output + second.output
        assert "from" in first.output.rpartition("training run")[2].partition("\n")[0], "a checkpoint"
        assert [line["step"] for line in run.metrics()] == list(range(1, STEPS + 1))
        summary = run.summary()
        assert summary["world_size"] == 2
        assert_all_trained(summary["ledger"], tasks=STEPS * 4, size=run.settings.rollout.size)
        run.assert_cleaned_up()
