"""What `sgpo-async plan` predicts for a learner rank, and what it takes: `python docs/results/plan/measure.py`.

One rank trains one full row of a random model of the shape of Qwen2-0.5B on the CPU, as the plan assumes: distillation
from itself, with AdamW's state in memory. Measured is the peak of anonymous memory (RssAnon) above the value after the
imports, in a process of its own for each setting; predicted is the plan's total. Prints a table and writes plan.json
beside this file. It takes up to 16 GB of memory and five minutes.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sgpo_async.bench import memory
from sgpo_async.config.schema import Algorithm, Learner, Rollout, Run
from sgpo_async.experiments.code_version import code_version
from sgpo_async.learner import optimiser
from sgpo_async.learner.policy import Policy, recompute, shard
from sgpo_async.learner.process_group import join_alone

HERE = Path(__file__).parent
CONFIG = Qwen2Config(
    vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True,
)  # fmt: skip
SETTINGS = [(512, False), (1024, False), (1024, True)]  # tokens of a row, recompute
PROMPT_TOKENS = 100


def settings(row_tokens: int, recomputes: bool) -> Run:
    return Run(
        rollout=Rollout(max_new_tokens=row_tokens),
        algorithm=replace(Algorithm(), objective="sgpo", teacher="self"),
        learner=Learner(row_tokens=row_tokens, recompute=int(recomputes)),
    )


def measured(run: Run) -> int:
    """Train on two rows, and return the peak of the second, in bytes above the value after the imports."""
    base, mesh = anonymous(), join_alone()
    torch.manual_seed(0)
    policy = Policy(Qwen2ForCausalLM(CONFIG))
    recompute(policy, run.learner.recompute)
    shard(policy, mesh, precision="float32")
    packed, adamw = memory.full_row(run, PROMPT_TOKENS), optimiser.build(policy, run.optim)
    memory.train_row(policy, None, packed, run)
    adamw.step()
    adamw.zero_grad()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    memory.train_row(policy, None, packed, run)
    done.set()
    thread.join()
    return peak[0] - base


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


def worker(row_tokens: int, recomputes: bool, way: str) -> None:
    torch.set_num_threads(1)
    run = settings(row_tokens, recomputes)
    if way == "measured":
        print(measured(run))
    else:
        print(memory.learner_memory(run, CONFIG, ranks=1, on_gpus=False, prompt_tokens=PROMPT_TOKENS).total)


def main() -> None:
    """Measure every setting and print."""
    rows = []
    for row_tokens, recomputes in SETTINGS:
        found = {}
        for way in ("measured", "planned"):
            command = [sys.executable, __file__, str(row_tokens), str(int(recomputes)), way]
            # glibc then returns every freed block of 64 kB or more to the system, so that RssAnon is what is in use.
            env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900, env=env).stdout
            found[way] = int(output.split()[-1])
        rows.append({"row_tokens": row_tokens, "recompute": recomputes} | found)
        ratio = found["planned"] / found["measured"]
        label = f"{row_tokens} tokens{', recomputed' if recomputes else ''}"
        gb = {way: nbytes / 1e9 for way, nbytes in found.items()}
        print(f"{label:24} planned {gb['planned']:6.2f} GB, measured {gb['measured']:6.2f} GB, ratio {ratio:.3f}")
        content = {"code": code_version(), "torch": torch.__version__, "settings": rows}
        (HERE / "plan.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        worker(int(sys.argv[1]), sys.argv[2] == "1", sys.argv[3])
    else:
        main()
