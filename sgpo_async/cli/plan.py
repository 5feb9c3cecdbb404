"""`sgpo-async plan`: memory, tokens per second and GPU-hours of a configuration, and what does not fit."""

from __future__ import annotations

import argparse
import sys

from sgpo_async.cli.options import add_config, load_run, print_dry_run

DOES_NOT_FIT = 1


NUMBERS = {
    "completion_tokens": "mean length of completions, for the time (default: a tenth of rollout.max_new_tokens)",
    "prompt_tokens": "length of prompts (default: 150)",
    "gpu_gb": "memory of a GPU (default: 80)",
    "train_tflops": "what a GPU reaches in training (default: 395.6, 40 %% of an H100)",
    "generate_tb_per_s": "memory traffic of a GPU in generation (default: 1.675, half of an H100's)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--completion-tokens N] [--prompt-tokens N] [rates of a GPU] [--dry-run]."""
    add_config(parser)
    for name, text in NUMBERS.items():
        kind = int if name == "prompt_tokens" else float
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)


def run(args: argparse.Namespace) -> int:
    """Compute and print; 1 if something does not fit. Raises SgpoError."""
    settings = load_run(args)
    if args.dry_run:
        print_dry_run(settings, [["sgpo-async", "plan", args.config, *args.overrides]])
        return 0
    from sgpo_async.bench.plan import GB, Hardware, plan, text
    from sgpo_async.config.schema import require

    given = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    for name, value in given.items():
        require(value > 0, f"--{name.replace('_', '-')}", "must be > 0", value)
    units = {"gpu_gb": ("memory", GB), "train_tflops": ("flops", 1e12), "generate_tb_per_s": ("bandwidth", 1e12)}
    hardware = Hardware(**{key: given[name] * unit for name, (key, unit) in units.items() if name in given})
    mean = given.get("completion_tokens", settings.rollout.max_new_tokens / 10)
    found = plan(settings, hardware, completion_tokens=mean, prompt_tokens=given.get("prompt_tokens", 150))
    print(text(found))
    for problem in found.problems:
        print(f"does not fit: {problem}", file=sys.stderr)
    return DOES_NOT_FIT if found.problems else 0
