"""`sgpo-async plan`: memory, tokens per second and GPU-hours of a configuration, and what does not fit."""

from __future__ import annotations

import argparse
import sys

from sgpo_async.cli.options import add_config, load_run, print_dry_run

DOES_NOT_FIT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...] [--completion-tokens N] [--prompt-tokens N] [rates of a GPU] [--dry-run]."""
    add_config(parser)
    limit = "mean length of completions, for the time; by default a tenth of the limit"
    parser.add_argument("--completion-tokens", type=float, metavar="N", help=limit)
    for name, kind, default, text in (
        ("--prompt-tokens", int, 150, "length of prompts"),
        ("--gpu-gb", float, 80.0, "memory of a GPU"),
        ("--train-tflops", float, 395.6, "what a GPU reaches in training; the default is 40 %% of an H100"),
        (
            "--generate-tb-per-s",
            float,
            1.675,
            "memory traffic of a GPU in generation; the default is half of an H100's",
        ),
    ):
        parser.add_argument(name, type=kind, default=default, metavar="N", help=f"{text} (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Compute and print; 1 if something does not fit. Raises SgpoError."""
    settings = load_run(args)
    if args.dry_run:
        print_dry_run(settings, [["sgpo-async", "plan", args.config, *args.overrides]])
        return 0
    from sgpo_async.bench.plan import GB, Hardware, plan, text

    hardware = Hardware(
        memory=args.gpu_gb * GB, flops=args.train_tflops * 1e12, bandwidth=args.generate_tb_per_s * 1e12
    )
    mean = args.completion_tokens or settings.rollout.max_new_tokens / 10
    found = plan(settings, hardware, completion_tokens=mean, prompt_tokens=args.prompt_tokens)
    print(text(found))
    for problem in found.problems:
        print(f"does not fit: {problem}", file=sys.stderr)
    return DOES_NOT_FIT if found.problems else 0
