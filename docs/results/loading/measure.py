"""Host memory of a rank while it loads the model: `python docs/results/loading/measure.py [RANKS ...]`.

A model of the shape of Qwen2-0.5B with random bfloat16 weights is loaded by 2 and by 4 ranks under torchrun, with gloo,
in two ways: whole, as models that cannot be read in slices are loaded (and all models were before), and in slices.
Prints a table and writes loading.json beside this file. It takes up to 11 GB of memory.

Memory is anonymous memory (RssAnon of /proc/self/status, read every 2 ms by a thread), because the resident size also
counts pages of mapped files, which the system drops when it needs memory. Peaks are differences from the value after
imports and the join of the process group, those of the teacher from the value before it; of the ranks, the largest
counts. A forward on CPUs gathers the embedding in several copies; `check` is such a forward.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen2Config, Qwen2ForCausalLM

from sgpo_async.config.schema import Algorithm, Learner, Run
from sgpo_async.experiments.code_version import code_version
from sgpo_async.learner import loading
from sgpo_async.learner.process_group import join_world

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip
RANKS = (2, 4)
PHASES = ("policy", "check", "forward", "teacher")
MB = 1e6
TIMEOUT_S = 1200


class Peak:
    """The largest anonymous memory of this process since the last call of `take`."""

    def __init__(self) -> None:
        self._bytes, self._stopped = 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def take(self) -> int:
        """Return the largest value, in bytes, and begin anew."""
        largest = max(self._bytes, anonymous())
        self._bytes = 0
        return largest

    def _watch(self) -> None:
        while not self._stopped.wait(0.002):
            self._bytes = max(self._bytes, anonymous())


def anonymous() -> int:
    """The anonymous memory of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) * 1024


def release() -> None:
    """Return freed memory to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def worker(folder: str, way: str) -> None:
    """Load policy and teacher as one rank; rank 0 prints the largest peaks over all ranks, in bytes."""
    run = Run(learner=Learner(precision="float32"))
    mesh = join_world(run.learner, timeout_s=TIMEOUT_S)
    if way == "whole":
        loading._slices = lambda _: None
    release()
    base, peak, peaks = anonymous(), Peak(), dict.fromkeys(PHASES, 0)
    check = loading.check_model

    def checked(policy: object) -> None:
        peaks["policy"] = peak.take()
        check(policy)
        peaks["check"] = peak.take()
        release()
        peak.take()

    loading.check_model = checked
    policy = loading.load_policy(folder, run, mesh)
    peaks["policy"] = max(peaks["policy"], peak.take())
    release()
    peak.take()
    check(policy)  # two forwards of the sharded policy, as a step of training runs
    peaks["forward"] = peak.take()
    policy.reshard()
    release()
    held = anonymous()
    peak.take()
    run = Run(algorithm=replace(Algorithm(), teacher="frozen", teacher_dtype="bfloat16"))
    teacher = loading.load_teacher(folder, run, mesh)
    peaks["teacher"] = peak.take()
    found = torch.tensor([peaks[phase] - (held if phase == "teacher" else base) for phase in PHASES])
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(json.dumps(dict(zip(PHASES, found.tolist(), strict=True))))
    del policy, teacher
    dist.destroy_process_group()


def measure(folder: str, way: str, ranks: int) -> dict[str, int]:
    """The peaks of one way on so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
    command += [f"--nproc-per-node={ranks}", __file__, "--worker", folder, way]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, check=True, env=environment, timeout=TIMEOUT_S, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(*words: str) -> None:
    """Measure both ways on each number of ranks."""
    found, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).bfloat16()
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        model.tie_weights()
        model.save_pretrained(folder, max_shard_size="300MB")
        elements, largest = sum(p.numel() for p in model.parameters()), max(p.numel() for p in model.parameters())
        del model
        for ranks in map(int, words or RANKS):
            for way in ("whole", "slices"):
                figures = found[f"{ranks} ranks, {way}"] = measure(folder, way, ranks)
                rows.append([str(ranks), way, *(f"{figures[phase] / MB:,.0f}" for phase in PHASES)])
            bounds = [f"{size * (elements / ranks + largest) / MB:,.0f}" for size in (4, 2)]
            rows.append([str(ranks), "1/ranks + 1 tensor", bounds[0], "", "", bounds[1]])
    sizes = {"elements": elements, "largest tensor": largest}
    report = {"code": code_version(), "shape": SHAPE | sizes, "peak anonymous bytes of a rank": found}
    (HERE / "loading.json").write_text(json.dumps(report, indent=1) + "\n")
    head = ["ranks", "loaded", *(f"{phase}, MB" for phase in PHASES)]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
