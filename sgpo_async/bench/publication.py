"""How long the learner waits for the publication of a version, and when it is visible, on ranks of this machine.

Ranks over gloo hold a language model of random weights in the shape of Qwen2.5-0.5B, in float32, and publish it in
bfloat16 after every step but the first two: one warms up, the other is the step alone. Three forward passes of a row
stand in for forward and backward of a step, which cost as much, because gradients and AdamW's state would need 12 GB
more memory; and every weight is changed. A row of few tokens, no reduction of gradients and no optimiser make a short
step, and so the share that is waited large: the work of a publication does not depend on them.

    python -m sgpo_async.bench.publication [--ranks 2] [--steps 4] [--tokens 256] [--label TEXT] [--to FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, Qwen2Config

from sgpo_async.bench.memory import full_row
from sgpo_async.config.schema import Algorithm, Run
from sgpo_async.learner.policy import Policy, shard
from sgpo_async.learner.publish import Publisher
from sgpo_async.weights import StoreFile, StoreWriter

QWEN = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)
PROMPT = 16  # tokens
ALONE = 2  # steps without a publication
PASSES = 3  # of a forward pass, in place of forward and backward


@dataclass(frozen=True)
class Step:
    """Seconds of one step of one rank."""

    train: float
    waits: float  # for the publication, until the next step can begin
    visible: float = 0.0  # from the end of the training until rank 0 reports the version


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table, and append it to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m sgpo_async.bench.publication", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps with a publication")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of each rank and step")
    parser.add_argument("--label", default="", help="what is measured, for the heading")
    parser.add_argument("--to", type=Path, help="file to which the table is appended")
    args = parser.parse_args(argv)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory(prefix="sgpo-publication-") as folder:
        mp.spawn(_rank, args=(args, Path(folder)), nprocs=args.ranks)
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(args.ranks)]
    text = _table(args, [[Step(**step) for step in own] for own in found])
    print(text, end="", flush=True)
    if args.to:
        with args.to.open("a", encoding="utf-8") as file:
            file.write(text)
    return 0


def _rank(rank: int, args: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=args.ranks)
    run = Run(algorithm=Algorithm(objective="grpo"))
    completions, learner = replace(run.rollout, max_new_tokens=args.tokens - PROMPT), run.learner
    run = replace(run, rollout=completions, learner=replace(learner, row_tokens=args.tokens))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(QWEN, dtype=torch.float32)
    policy = shard(Policy(model), init_device_mesh("cpu", (args.ranks,)), precision="float32")
    file = StoreFile(folder, expected_bytes=2 * sum(p.numel() for p in policy.parameters()))
    visible: list[float] = []
    publisher = Publisher(
        policy,
        torch.bfloat16,
        store=StoreWriter(file.path) if rank == 0 else None,
        published=lambda *_: visible.append(time.monotonic()),
    )
    steps, ends = _train(run, policy, publisher, args.steps)
    publisher.close()
    for number, (at, end) in enumerate(zip(visible, ends, strict=rank == 0), ALONE):
        steps[number] = replace(steps[number], visible=at - end)
    torch.save([asdict(step) for step in steps], folder / f"{rank}.pt")
    dist.barrier()
    file.close()


@torch.no_grad()
def _train(run: Run, policy: Policy, publisher: Publisher, published: int) -> tuple[list[Step], list[float]]:
    """Train ALONE steps alone and `published` with a publication; return them, and when the latter had trained."""
    packed = full_row(run, PROMPT)
    assert isinstance(policy, FSDPModule)
    steps: list[Step] = []
    ends: list[float] = []
    for number in range(ALONE + published):
        dist.barrier()
        began = time.monotonic()
        for _ in range(PASSES):
            policy.log_probabilities(packed, 1.0)
        policy.reshard()
        for parameter in policy.parameters():
            parameter.mul_(0.999)
        dist.barrier()
        end = time.monotonic()
        if number >= ALONE:
            publisher.publish(number)
            ends.append(end)
        steps.append(Step(end - began, time.monotonic() - end))
    return steps, ends


def _table(args: argparse.Namespace, ranks: list[list[Step]]) -> str:
    options = " ".join(f"--{name} {getattr(args, name)}" for name in ("ranks", "steps", "tokens"))
    lines = [f"$ python -m sgpo_async.bench.publication {options}    {args.label}".rstrip()]
    lines.append(f"{'step':>12} {'trains':>9} {'waits':>9} {'share':>7} {'visible after':>14}")
    rows: list[Step] = []
    for number, own in enumerate(zip(*ranks, strict=True)):
        train, waits, visible = (max(getattr(step, name) for step in own) for name in ("train", "waits", "visible"))
        name = "warm-up" if number == 0 else "alone" if number < ALONE else str(number - ALONE + 1)
        shown = (f"{waits:.2f} s", f"{waits / (train + waits):.1%}", f"{visible:.2f} s") if visible else ("", "", "")
        lines.append("{:>12} {:>9} {:>9} {:>7} {:>14}".format(name, f"{train:.2f} s", *shown).rstrip())
        rows.append(Step(train, waits))
    later = rows[ALONE + 1 :] or rows[ALONE:]  # the first publication allocates
    share = sum(row.waits for row in later) / sum(row.train + row.waits for row in later)
    lines.append(f"{'2 and later':>12} {'':>9} {'':>9} {share:>7.1%}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
