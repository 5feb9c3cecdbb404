"""A task of several turns, in one file: the policy learns which store to ask.

    python examples/tool_use.py --out runs/tool-use       problems, a base policy, and the run's configuration
    sgpo-async local runs/tool-use/config.yaml            SGPO on pairs of autonomous and guided episodes

Each of twelve items is kept in one of four stores, which no problem says. The policy looks into a store and reads what
the store replies, a number or `none`; then it answers:

    problem    count apple on 4 7
    policy     look north apple         reply   none
    policy     look west apple          reply   5
    policy     answer 5                 reward  1

The base policy knows how to look and how to answer, but not where: it asks a random store, and answers what it reads.
If a strategy names the store, it asks that one. So it solves a fourth of the problems alone, and nearly all with the
strategy. Training teaches it the twelve stores.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgpo_async.files import set_usual_modes
from sgpo_async.installation import example_module
from sgpo_async.tasks.environments import Turn

STORES = ("north", "east", "south", "west")
ITEMS = ("apple", "bread", "candle", "dish", "eraser", "flour", "glove", "hammer", "ink", "jar", "knife", "lamp")
STORE_OF = {item: STORES[number * 7 % 4] for number, item in enumerate(ITEMS)}
WORDS = ("<pad>", "<eos>", "<unk>", "count", "on", "look", "answer", "none", *"0123456789", *STORES, *ITEMS)

CONFIG = """\
name: tool-use
steps: 60
model: {{path: {out}/base}}
tasks:
  source: file
  path: {out}/problems.jsonl
  held_out: 60
  environment: {module}:Shelves      # found from the folder in which the run is started, or where it is installed
  max_turns: 2
rollout: {{autonomous: 8, guided: 4, max_new_tokens: 12}}
learner: {{problems_per_step: 16}}
optim: {{lr: 1.0e-3, warmup_steps: 5, schedule: linear}}
evaluation: {{every: 20}}
engine: {{slots: 64}}
"""


class Shelves:
    """The environment: `look STORE ITEM` is a call of the tool, `answer NUMBER` ends the episode."""

    def reset(self, problem: str, answer: str, columns: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Begin an episode with this problem."""
        self.item, self.answer = problem.split()[1], answer

    def step(self, completion: str) -> Turn:
        """Reply to a call; judge an answer."""
        match completion.split():
            case ["look", store, item]:
                return Turn(reply=self.answer if item == self.item and store == STORE_OF[item] else "none")
            case ["answer", number]:
                return Turn(done=True, reward=float(number == self.answer))
        return Turn(done=True)


def write_problems(path: Path, rng: random.Random, count: int = 600) -> None:
    """Write problems with strategies; the two digits make every problem a different text."""
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            item = rng.choice(ITEMS)
            problem = f"count {item} on {rng.randrange(10)} {rng.randrange(10)}"
            record = {"problem": problem, "answer": str(rng.randrange(10)), "strategy": f"{item} {STORE_OF[item]}"}
            file.write(json.dumps(record) + "\n")


def draw_episode(rng: random.Random) -> list[tuple[str, bool]]:
    """An episode of the base policy, as texts and whether it writes them itself."""
    item, store, reply = rng.choice(ITEMS), rng.choice(STORES), rng.choice((*"0123456789", "none"))
    strategy = f"{item} {store} " if rng.random() < 0.5 else ""
    prompt = f"{strategy}count {item} on {rng.randrange(10)} {rng.randrange(10)}"
    return [(prompt, False), (f"look {store} {item} <eos>", True), (reply, False), (f"answer {reply} <eos>", True)]


def write_base_policy(folder: Path, rng: random.Random, steps: int = 250) -> None:
    """Train the base policy on its own tokens of random episodes; takes less than a minute."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=12, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids, labels = [], []
        for _ in range(64):
            parts = [(tokenizer.encode(text), own) for text, own in draw_episode(rng)]
            ids.append(torch.tensor([token for part, _ in parts for token in part]))
            labels.append(torch.tensor([token if own else -100 for part, own in parts for token in part]))
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        expected = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        logits = model(input_ids=padded, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), expected[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    set_usual_modes(folder)


def main() -> None:
    """Write everything that the run needs."""
    parser = argparse.ArgumentParser(description="Problems, base policy and configuration of the tool-using example.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    write_problems(out / "problems.jsonl", rng)
    write_base_policy(out / "base", rng)
    (out / "config.yaml").write_text(CONFIG.format(out=out, module=example_module("tool_use")), encoding="utf-8")
    print(f"now run: sgpo-async local {out}/config.yaml")


if __name__ == "__main__":
    main()
