"""The demo against TRL's GRPOTrainer: the same initial policy, problems, reward, budget and cores.

    sgpo-async bench trl --trl PYTHON [--quick] [--to DIR]      PYTHON: of an environment with TRL (make trl)

    sgpo         the demo with one learner rank and one actor, so that each has a core
    grpo         the same with algorithm.objective=grpo, twelve rollouts of each problem, and all of them trained
                 (learner.skip_uniform=false): the method and the work of TRL
    trl          GRPOTrainer, as `bench.trl_worker` runs it

The settings take turns; a ratio is computed within each turn. Rates are between the first step and the last but one,
and by the CPU time of whole commands, which other processes on the machine change less. A time to a pass rate is the
time in the training loop at the end of the step whose version was the first to reach it among those that were
evaluated, without the start of processes. The evaluations of TRL are not counted; those of the demo are, as actors do
them while the learner trains.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sgpo_async.bench.figures import (
    columns,
    header,
    interval,
    load,
    machine,
    publish,
    ratio,
    spread,
    verdict,
    versions,
    versions_elsewhere,
)
from sgpo_async.config import Run
from sgpo_async.config import load as load_config
from sgpo_async.config.schema import require
from sgpo_async.errors import DeadlineExceeded, SgpoError
from sgpo_async.files import write_whole
from sgpo_async.metrics import read_metrics, read_summary
from sgpo_async.model.folder import model_folder
from sgpo_async.processes.marked import MARK, kill_run
from sgpo_async.tasks import cues_domain
from sgpo_async.tasks.sources import source_of

STEPS, QUICK_STEPS = 120, 12
REPETITIONS, QUICK_REPETITIONS = 3, 1
RUN_S = 1800.0
TARGET = 0.9  # pass rate on the held-out problems
GRPO = ["algorithm.objective=grpo", "rollout.autonomous=12", "rollout.guided=0", "learner.skip_uniform=false"]
SETTINGS = ("sgpo", "grpo", "trl")
PROCESSES = 2  # of TRL, of one thread each
# Ours on two cores. At a lag of up to 2, rollouts of three steps are in flight, up to 3 x 16 x 12; most have ended.
LAYOUT = ["local.ranks=1", "local.actors=1", "engine.slots=384"]
# TRL generates for so many steps at once, so the tokens of a step are 1.5 versions old in the mean.
STEPS_PER_GENERATION = 4
BARS = (
    ("grpo", "trl", "tokens_per_s", 2.0),
    ("grpo", "trl", "tokens_per_cpu_s", 2.0),
    ("sgpo", "trl", "tokens_per_s", 2.0),
    ("sgpo", "trl", "problems_per_s", 2.0),
)
REMEDY = "make trl makes such an environment, .venv-trl/bin/python"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run."""

    tokens_per_s: float  # trained tokens of completions
    problems_per_s: float
    pass_rates: list[tuple[float, float]]  # of each evaluation: seconds in the training loop, pass rate alone
    tokens_per_cpu_s: float = 0.0  # by the CPU time of the whole command, start and evaluations included
    generating: float | None = None  # the share of the time in which TRL generates

    @property
    def best(self) -> float:
        """The highest pass rate."""
        return max(rate for _, rate in self.pass_rates)

    @property
    def target_s(self) -> float | None:
        """Seconds to the first evaluation that reached TARGET; None if none did."""
        return next((seconds for seconds, rate in self.pass_rates if rate >= TARGET), None)


def run_bench_trl(*, quick: bool, trl: str, trl_set: Sequence[str], to: Path) -> int:
    """Measure in turns; print the table, write trl.txt and trl.json into `to`.

    Args:
        trl: the Python of an environment with TRL.
        trl_set: `key=value` for GRPOConfig, beyond those of `trainer_settings` or in their place; a value is JSON.

    Raises SgpoError if there is no such environment, or with the end of the log of a process that failed.
    """
    if not trl:
        raise SgpoError(f"bench trl: needs --trl PYTHON, the Python of an environment with TRL; {REMEDY}")
    there = versions_elsewhere(trl, "trl", "torch", "transformers", "accelerate", given=f"--trl {trl}", remedy=REMEDY)
    steps = QUICK_STEPS if quick else STEPS
    known: dict[str, Any] = {
        "machine": machine(),
        "versions": versions("torch", "transformers") | {f"{name} (TRL's)": found for name, found in there.items()},
        "load": [load(), load()],
        "steps": steps,
        "trl": trainer_settings(run_of("trl", steps=steps, seed=0, out="OUT"), trl_set),
    }
    found: dict[str, list[Measured]] = {setting: [] for setting in SETTINGS}
    for seed in range(QUICK_REPETITIONS if quick else REPETITIONS):
        for setting, runs in found.items():
            print(f"repetition {seed + 1}: {setting}, {steps} steps ...", file=sys.stderr, flush=True)
            runs.append(measure(setting, steps=steps, seed=seed, trl=trl, trl_set=trl_set))
        known["load"][1] = load()
        report = report_of(found) | known
        publish("trl", to, table(report), report)  # after each repetition, as a whole measurement takes long
    return 0


def measure(setting: str, *, steps: int, seed: int, trl: str, trl_set: Sequence[str] = ()) -> Measured:
    """One run of one setting, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(setting, steps=steps, seed=seed, out=folder)
        before = _cpu_s()
        if setting == "trl":
            tokens, found = _measure_trl(run, trl, trainer_settings(run, trl_set))
        else:
            command = [sys.executable, "-m", "sgpo_async.cli", "local", "builtin:demo"]
            _execute([*command, *_overrides(setting, steps, seed), f"out={folder}"], setting)
            lines = read_metrics(run.folder)
            tokens, found = lines[-1]["tokens_trained"], measured_run(lines, read_summary(run.folder), run)
        return replace(found, tokens_per_cpu_s=tokens / (_cpu_s() - before))


def _cpu_s() -> float:
    """CPU time of all processes that this one has started and that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _overrides(setting: str, steps: int, seed: int) -> list[str]:
    own = [f"steps={steps}", f"seed={seed}", f"evaluation.every={min(20, steps)}", "learner.trackers=[]"]
    return [*LAYOUT, *own, *([] if setting == "sgpo" else GRPO)]


def run_of(setting: str, *, steps: int, seed: int, out: str) -> Run:
    """The configuration of a setting; TRL's is translated from the demo's with GRPO."""
    return load_config("builtin:demo", [*_overrides(setting, steps, seed), f"out={out}"])


def measured_run(lines: Sequence[dict[str, Any]], summary: dict[str, Any], run: Run) -> Measured:
    """What a run of ours has measured, from its metrics and its summary."""
    first, last = lines[0], lines[-2]  # the last line waits for the final evaluation
    wall = last["wall_s"] - first["wall_s"]
    ended = {0: 0.0} | {line["step"]: line["wall_s"] for line in lines}
    return Measured(
        tokens_per_s=(last["tokens_trained"] - first["tokens_trained"]) / wall,
        problems_per_s=run.learner.problems_per_step * (last["step"] - first["step"]) / wall,
        pass_rates=[(ended[one["version"]], one["pass_auto"]) for one in summary["evaluations"]],
    )


def trainer_settings(run: Run, changes: Sequence[str] = ()) -> dict[str, Any]:
    """The arguments of TRL's GRPOConfig that do what `run` does, with `changes`. Raises ConfigError."""
    sizes, optim, algorithm = run.rollout, run.optim, run.algorithm
    found: dict[str, Any] = {
        "output_dir": f"{run.out}/trl",
        "max_steps": run.steps,
        "seed": run.seed,
        "per_device_train_batch_size": run.learner.problems_per_step * sizes.size // PROCESSES,
        "num_generations": sizes.size,
        "max_completion_length": sizes.max_new_tokens,
        "temperature": sizes.temperature,
        "top_p": sizes.top_p,
        "top_k": sizes.top_k,
        "epsilon": algorithm.eps_low,
        "epsilon_high": algorithm.eps_high,
        "learning_rate": optim.lr,
        "lr_scheduler_type": optim.schedule,
        "warmup_steps": optim.warmup_steps,
        "adam_beta1": optim.beta1,
        "adam_beta2": optim.beta2,
        "weight_decay": optim.weight_decay,
        "max_grad_norm": optim.grad_clip,
        # The mean over the tokens of each completion, then over completions; no KL to the initial policy, as here.
        "loss_type": "grpo",
        "beta": 0.0,
        "shuffle_dataset": False,
        # What makes it fast here: larger batches to generate, nothing recomputed, no search for unused parameters.
        "steps_per_generation": min(STEPS_PER_GENERATION, run.steps),
        "gradient_checkpointing": False,
        "ddp_find_unused_parameters": False,
        "disable_dropout": True,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": run.steps,
        "disable_tqdm": True,
    }
    for change in changes:
        key, equals, value = change.partition("=")
        require(bool(key and equals), "bench trl: --trl-set", "must be key=value", change)
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _measure_trl(run: Run, python: str, trainer: dict[str, Any]) -> tuple[float, Measured]:
    """The trained tokens of a whole run, and what was measured."""
    source, count = source_of(run), run.steps * run.learner.problems_per_step
    texts = {"problems": [source.training(i) for i in range(count)], "held_out": source.held_out()}
    settings = {
        name: {"prompt": [one.problem for one in own], "answer": [one.answer for one in own]}
        for name, own in texts.items()
    } | {
        "model": str(Path(model_folder(run.model.path)).resolve()),
        "verifier": cues_domain.__file__,
        "threads": 1,
        "evaluate_every": run.evaluation.every,
        "out": f"{run.out}/measured",
        "trainer": trainer,
    }
    path = Path(run.out) / "settings.json"
    write_whole(path, json.dumps(settings))
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    _execute([*torchrun, str(Path(__file__).with_name("trl_worker.py")), str(path)], "trl")
    ranks = [json.loads(Path(f"{run.out}/measured-{i}.json").read_text(encoding="utf-8")) for i in range(PROCESSES)]
    return sum(rank["tokens"][-1] for rank in ranks), measured_trl(ranks, run, parts=trainer["steps_per_generation"])


def measured_trl(ranks: Sequence[dict[str, Any]], run: Run, *, parts: int) -> Measured:
    """What TRL has measured, from what each of its processes has written."""
    ended = [0.0, *ranks[0]["ended_s"]]
    tokens = [sum(counts) for counts in zip(*(rank["tokens"] for rank in ranks), strict=True)]
    # Between the ends of two steps before which all was generated anew, as far apart as possible: whole generations.
    first, last = parts - 1, len(tokens) - 1 - len(tokens) % parts
    wall = ended[last + 1] - ended[first + 1]
    return Measured(
        tokens_per_s=(tokens[last] - tokens[first]) / wall,
        problems_per_s=run.learner.problems_per_step * (last - first) / wall,
        pass_rates=[(ended[step], rate) for step, rate in ranks[0]["evaluations"]],
        generating=ranks[0]["generating_s"] / ended[-1],
    )


def _execute(command: Sequence[str], setting: str) -> None:
    """Run to the end. Raises SgpoError with the last lines, DeadlineExceeded."""
    # PYTHONSAFEPATH: in the folder of trl_worker.py, this file is also named trl.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONSAFEPATH": "1"} if setting == "trl" else {}
    mark = uuid.uuid4().hex
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=environment | {MARK: mark},
            timeout=RUN_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        raise DeadlineExceeded(f"bench trl: {setting}", "end of the run", RUN_S) from None
    finally:
        kill_run(mark)  # torchrun leaves its processes behind when it is killed
    if done.returncode:
        # torchrun writes its own report after that of its processes.
        last = (done.stderr or done.stdout).partition("torch/distributed/elastic")[0][-2000:]
        raise SgpoError(f"bench trl: {setting} ended with code {done.returncode}:\n{last}")


def report_of(found: dict[str, list[Measured]]) -> dict[str, Any]:
    """All figures, and the ratios within each repetition."""
    settings = {}
    for setting, runs in found.items():
        reached = [run.target_s for run in runs if run.target_s is not None]
        settings[setting] = {
            "tokens_per_s": spread([run.tokens_per_s for run in runs]),
            "problems_per_s": spread([run.problems_per_s for run in runs]),
            "tokens_per_cpu_s": spread([run.tokens_per_cpu_s for run in runs]),
            "best": spread([run.best for run in runs]),
            "last": spread([run.pass_rates[-1][1] for run in runs]),
            "reached": len(reached),
            "target_s": spread(reached) if reached else None,
            "runs": [asdict(run) for run in runs],
        }
    ratios = []
    for of, to, figure, bar in BARS:
        pair = ([getattr(run, figure) for run in found[of]], [getattr(run, figure) for run in found[to]])
        ratios.append({"figure": figure} | ratio(of, to, bar, pair))
    return {"settings": settings, "ratios": ratios}


def table(report: dict[str, Any]) -> list[str]:
    """The lines of the table."""
    runs = len(report["settings"]["trl"]["runs"])
    lines = header(
        report,
        f"builtin:demo, {report['steps']} steps; median (least..most) of {runs} repetitions with seeds 0 to {runs - 1}",
    )
    names = {"tokens_per_s": "trained tokens/s", "problems_per_s": "problems/s", "tokens_per_cpu_s": "tokens/CPU s"}
    rows = [["", *names.values(), "pass rate at the end", f"reached {TARGET:.0%}", "after, s"]]
    for setting, found in report["settings"].items():
        rows.append(
            [
                setting,
                *(interval(found[figure], ".1f" if figure == "problems_per_s" else ",.0f") for figure in names),
                interval(found["last"], ".0%"),
                f"{found['reached']} of {runs}",
                interval(found["target_s"], ".1f") if found["target_s"] else "never",
            ]
        )
    ratios = [["", "ratio", "bar", ""]]
    for found in report["ratios"]:
        name = f"{found['of']} / {found['to']}, {names[found['figure']]}"
        ratios.append([name, interval(found), f"{found['bar']:g}", verdict(found)])
    generating = statistics.median(one["generating"] for one in report["settings"]["trl"]["runs"])
    return [*lines, "", *columns(rows), "", *columns(ratios), "", f"TRL generates in {generating:.0%} of its time."]
