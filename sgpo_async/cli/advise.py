"""`sgpo-async advise`: which side limits a run, what one change brings, and the best division of GPUs.

sgpo-async advise runs/demo                                        from what a run has measured
sgpo-async advise builtin:paper-qwen2.5-7b --gpus 8 16 64           from a configuration and the rates of a GPU

Each prediction comes from a closed form, and beside it stands a simulated run with the hub's real rules.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sgpo_async.cli.options import load_run
from sgpo_async.errors import ConfigError

if TYPE_CHECKING:
    from sgpo_async.config import Run
    from sgpo_async.simulation.hardware import Hardware, Shape
    from sgpo_async.simulation.world import Settings

STEPS = 10  # of a simulated run
LAGS = (1, 2, 4, 8)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN or CONFIG [key=value ...] and what is stated about GPUs and lengths."""
    parser.add_argument("config", metavar="RUN|CONFIG", help="folder of a run, or a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="CONFIG: overrides a key")
    parser.add_argument("--gpus", type=int, nargs="+", default=[], metavar="N", help="CONFIG: how to divide N GPUs")
    mean = "CONFIG: mean length of completions (default: a tenth of rollout.max_new_tokens)"
    parser.add_argument("--completion-tokens", type=float, metavar="N", help=mean)
    parser.add_argument("--prompt-tokens", type=int, default=150, metavar="N", help="CONFIG: length of prompts")
    parser.add_argument("--train-tflops", type=float, metavar="N", help="what a GPU reaches in training")
    parser.add_argument("--generate-tb-per-s", type=float, metavar="N", help="its memory traffic in generation")
    parser.add_argument("--no-simulation", action="store_true", help="predictions alone, in seconds")


def run(args: argparse.Namespace) -> int:
    """Predict, simulate and print. Raises SgpoError."""
    if Path(args.config).is_dir():
        return _advise_run(args)
    return _advise_configuration(args)


def _advise_run(args: argparse.Namespace) -> int:
    from sgpo_async.config import load
    from sgpo_async.metrics import read_metrics
    from sgpo_async.metrics.samples import read_samples
    from sgpo_async.simulation.calibrate import from_run

    if args.gpus or args.overrides:
        raise ConfigError("advise: --gpus and key=value are for a configuration, not for the folder of a run")
    folder = Path(args.config)
    settings, measured = from_run(load(folder / "config.yaml", []), read_metrics(folder), list(read_samples(folder)))
    rate = f"{measured.tokens_per_s:,.0f} trained tokens/s, {measured.step_s:.2f} s a step, lag {measured.mean_lag:.1f}"
    idle = f"the trainer waited {measured.learner_idle:.0%} of the time, the engines {measured.engine_idle:.0%}"
    print(f"measured: {rate}; {idle}")
    _report(replace(settings, steps=STEPS), simulated=not args.no_simulation)
    return 0


def _advise_configuration(args: argparse.Namespace) -> int:
    from sgpo_async.simulation.calibrate import from_configuration
    from sgpo_async.simulation.hardware import Hardware

    configured, gpu = load_run(args), Hardware()
    if args.train_tflops:
        gpu = replace(gpu, flops=args.train_tflops * 1e12)
    if args.generate_tb_per_s:
        gpu = replace(gpu, bandwidth=args.generate_tb_per_s * 1e12)
    mean = args.completion_tokens or configured.rollout.max_new_tokens / 10
    shape = _shape(configured)
    settings = from_configuration(configured, shape, gpu, mean=mean, prompt=args.prompt_tokens)
    settings = replace(settings, steps=STEPS)
    print(f"{shape.name}, completions of {mean:,.0f} tokens in the mean; one GPU: {gpu.flops / 1e12:,.0f} TFLOP/s in "
          f"training, {gpu.bandwidth / 1e12:.2f} TB/s in generation (stated)")  # fmt: skip
    _report(settings, simulated=not args.no_simulation)
    for gpus in args.gpus:
        _divisions(settings, shape, gpu, gpus=gpus, tp=configured.engine.sglang.tp, simulated=not args.no_simulation)
    return 0


def _report(settings: Settings, *, simulated: bool) -> None:
    """What limits the run, and what one change of each kind brings."""
    from sgpo_async.simulation.advice import WHY, changes, examine

    now = examine("as it is", settings, simulated=simulated)
    sides = f"{_count(settings.learner.ranks, 'learner rank')}, {_count(settings.nodes, 'inference node')}"
    where = f"{settings.engine.slots} slots, hub.max_lag={settings.max_lag}"
    print(f"\n{sides} of {where}: limited by {now.predicted.limit}")
    print(f"  {WHY[now.predicted.limit]}")
    print(f"\n{'':26}{'predicted':>12}{'':8}{'lag':>6}{'simulated':>13}{'lag':>6}{'error':>8}  limited by")
    for change in [now, *(examine(name, one, simulated=simulated) for name, one in changes(settings).items())]:
        gain = change.predicted.tokens_per_s / now.predicted.tokens_per_s - 1
        cells = f"{change.name:26}{change.predicted.tokens_per_s:10,.0f}/s{gain:+8.0%}{change.predicted.mean_lag:6.1f}"
        if change.simulated:
            cells += f"{change.simulated.tokens_per_s:11,.0f}/s{change.simulated.mean_lag:6.1f}{change.error:+8.1%}"
        print(f"{cells}  {change.predicted.limit}", flush=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _divisions(settings: Settings, shape: Shape, gpu: Hardware, *, gpus: int, tp: int, simulated: bool) -> None:
    """The best division of GPUs for each lag."""
    from sgpo_async.simulation.advice import best, divisions, examine

    print(f"\n{gpus} GPUs: the best division for each lag")
    for lag in LAGS:
        found = best(divisions(replace(settings, max_lag=lag), shape, gpu, gpus=gpus, tp=tp))
        change = examine("", found, simulated=simulated)
        ranks, servers = found.learner.ranks, found.nodes
        cells = f"  hub.max_lag={lag}: {ranks:3} for the learner, {servers:3} servers of {tp}  "
        cells += f"{change.predicted.tokens_per_s:10,.0f}/s, lag {change.predicted.mean_lag:.1f}"
        if change.simulated:
            cells += f"; simulated {change.simulated.tokens_per_s:10,.0f}/s, lag {change.simulated.mean_lag:.1f}"
            cells += f", error {change.error:+.1%}"
        print(cells, flush=True)


def _shape(configured: Run) -> Shape:
    """What the model of a configuration needs: by its name, or from its config.json."""
    from sgpo_async.simulation.hardware import KNOWN, Shape

    for known in KNOWN:
        if known.name.lower() in configured.model.path.lower():
            return known
    import torch

    from sgpo_async.model.folder import model_folder
    from sgpo_async.model.load import cache_bytes, on_meta_device, read_config

    config = read_config(model_folder(configured.model.path))
    dtype = getattr(torch, configured.model.dtype)
    parameters = sum(one.numel() for one in on_meta_device(config).parameters())
    name = Path(configured.model.path).name
    return Shape(name=name, parameters=parameters, token_bytes=cache_bytes(config, dtype=dtype, tp=1))
