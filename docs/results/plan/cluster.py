"""The sizing table of docs/cluster.md: `python docs/results/plan/cluster.py`. Seconds, no GPU.

Each row is `sgpo-async plan configs/paper-qwen2.5-7b.yaml launch/cluster/cluster.yaml` with other numbers, for the
shape of Qwen2.5 7B: nodes of eight GPUs with 80 GB, weights and AdamW sharded within a node. Rates are those that the
plan assumes for an H100, so times are estimates. A completion has 1,638 tokens on average, a tenth of the longest.
"""

import sys
import tempfile
from pathlib import Path

from transformers import Qwen2Config

from sgpo_async.bench.cost import rl_generated, rl_trained
from sgpo_async.bench.memory import RESERVED
from sgpo_async.bench.plan import GB, Hardware, plan
from sgpo_async.config import load

ROOT = Path(__file__).resolve().parents[3]
SHAPE = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False,
)  # fmt: skip
NODE, SLOTS = 8, 56  # GPUs of a node, sequences of a server
SPLITS = [(4, 4, 128), (8, 8, 128), (8, 16, 128), (16, 48, 256), (64, 192, 512), (128, 384, 1024)]  # 3rd: problems
PROMPT_TOKENS = 150


def row(model: str, ranks: int, servers: int, problems: int) -> list[str]:
    """The cells of one row; what does not fit is printed on standard error."""
    own = min(servers, NODE)
    given = [str(ROOT / "launch/cluster/cluster.yaml"), f"model.path={model}", f"learner.problems_per_step={problems}"]
    given += [f"local.ranks={min(ranks, NODE)}", f"local.actors={servers // own}", "hub.max_message_mb=65536"]
    given += [f"engine.sglang.servers={own}", f"engine.slots={SLOTS * own}"]
    run = load(ROOT / "configs/paper-qwen2.5-7b.yaml", given)
    mean = run.rollout.max_new_tokens / 10
    found = plan(run, Hardware(), completion_tokens=mean, prompt_tokens=PROMPT_TOKENS)
    for problem in found.problems:
        print(f"{ranks} + {servers}: {problem}", file=sys.stderr)
    learner = rl_trained(run, found.given) / run.steps / (found.train_tokens_per_s * ranks)
    inference = rl_generated(run, found.given) / run.steps / (found.generate_tokens_per_s * servers)
    sequences = run.hub.most_batches * problems * run.rollout.size / servers
    return [
        str(max(1, (ranks + servers) // NODE)),
        f"{ranks} + {servers}",
        str(problems),
        f"{(found.learner.total + RESERVED) / GB:.0f}",
        f"{run.hub.most_batches} x {problems} x {run.rollout.size} / {servers} = {sequences:.0f}",
        f"{learner:.0f}",
        f"{inference:.0f}",
    ]


if __name__ == "__main__":
    head = "nodes | GPUs: learner + inference | problems a step | GB of a learner's GPU | sequences for each server"
    print(f"| {head} | step: learner, s | inference, s |\n|{'---|' * 7}")
    with tempfile.TemporaryDirectory() as folder:
        SHAPE.save_pretrained(folder)
        for split in SPLITS:
            print("| " + " | ".join(row(folder, *split)) + " |")
