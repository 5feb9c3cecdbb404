"""Copies results from runs/ to this folder, and prints their tables: `python docs/results/smollm2/collect.py`.

Of each run it keeps the configuration, the summary, and the columns of metrics.jsonl below; of the evaluations their
summaries and the texts of the first problems.
"""

import json
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
RUNS = HERE.parents[2] / "runs"
COLUMNS = (
    "step", "wall_s", "pass_auto", "pass_guided", "alpha", "loss", "kl_mean", "entropy", "grad_norm", "lag_mean",
    "tokens_trained", "tokens_forward_only", "tokens_generated", "learner_idle", "engine_idle",
    "mismatch_tokens_lag0_first", "mismatch_mean_lag0_first", "mismatch_max_lag0_first",
    "mismatch_mean_lag0_later", "mismatch_kl_stale_first", "lr",
)  # fmt: skip
STAGES = ("base", "warm-up", "trained")
SHOWN = 6  # problems whose texts are kept


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def keep_run(name: str) -> None:
    """Copy a run, and print a row for each of its steps."""
    target = HERE / name
    target.mkdir(exist_ok=True)
    for file in ("config.yaml", "summary.json"):
        shutil.copyfile(RUNS / name / file, target / file)
    steps = [{key: line[key] for key in COLUMNS} for line in lines(RUNS / name / "metrics.jsonl")]
    (target / "steps.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps), encoding="utf-8")
    print(
        f"\n{name}\n\n| step | alone | guided | alpha | lag | seconds | mismatch at lag 0, mean (max) |\n"
        + "|---" * 7
        + "|"
    )
    before = 0.0
    for one in steps:
        mismatch = one["mismatch_mean_lag0_first"]
        shown = f"{mismatch:.0e} ({one['mismatch_max_lag0_first']:.0e})" if mismatch is not None else ""
        print(
            f"| {one['step']} | {one['pass_auto']:.0%} | {one['pass_guided']:.0%} | {one['alpha']:.2f} | "
            f"{one['lag_mean']:.1f} | {one['wall_s'] - before:.0f} | {shown} |"
        )
        before = one["wall_s"]
    summary = json.loads((target / "summary.json").read_text())
    later = steps[1:]
    seconds = steps[-1]["wall_s"] - steps[0]["wall_s"]
    tokens = sum(one["tokens_trained"] + one["tokens_forward_only"] for one in later)
    print(f"\nlearner, tokens/s trained or scored from the second step on: {tokens / seconds:.1f}")
    print(f"engine, tokens/s of the whole run: {summary['tokens_generated'] / summary['wall_s']:.1f}")
    print(f"learner idle {mean(one['learner_idle'] for one in later):.0%} from the second step on")
    for one in summary["evaluations"]:
        print({key: one[key] for key in ("version", "pass_auto", "pass_guided")})


def keep_evaluations() -> None:
    """Print a row for each stage, and write some texts of each."""
    problems = {one["problem"]: one for one in lines(RUNS / "word-problems" / "problems.jsonl")}
    numbered = dict(enumerate(problems.values(), start=1))
    texts, summaries = dict[int, list[str]](), dict[str, Any]()
    print("\n| | alone, avg@4 | with the strategy | cut off | tokens |\n" + "|---" * 5 + "|")
    for stage in STAGES:
        found = {}
        for way in ("", "--guided"):
            folder = RUNS / "smollm2-evaluations" / f"{stage}{way}"
            found[way] = json.loads((folder / "summary.json").read_text())["benchmarks"]["held-out"]
            summaries[f"{stage}{way}"] = found[way]
            by_number = {int(line["id"].rpartition(":")[2]): line for line in lines(folder / "held-out.jsonl")}
            for number, line in sorted(by_number.items())[:SHOWN]:
                mark = "right" if line["correct"][0] else "wrong"
                name = f"{stage}, {'with the strategy' if way else 'alone'}"
                texts.setdefault(number, []).append(f"- {name} ({mark}): `{json.dumps(line['texts'][0])}`")
        means = [one["avg"] for one in found.values()]
        cells = [f"{one['mean']:.1%} [{one['low']:.0%}, {one['high']:.0%}]" for one in means]
        print(f"| {stage} | {' | '.join(cells)} | {found['']['truncated']:.1%} | {found['']['tokens_mean']:.1f} |")
    (HERE / "evaluations.json").write_text(json.dumps(summaries, indent=1) + "\n", encoding="utf-8")
    pages = ["# Completions\n\nThe first of four samples of each, at temperature 1; written by `collect.py`.\n"]
    for number, found_texts in texts.items():
        one = numbered[number]
        pages.append(
            f"{one['problem']} ({one['answer']})\n\nStrategy: {one['strategy']}\n\n" + "\n".join(found_texts) + "\n"
        )
    (HERE / "samples.md").write_text("\n".join(pages), encoding="utf-8")


def keep_examined() -> None:
    """Print the pass rates of the policies that `run.sh examine` has evaluated, and write their summaries."""
    operations = [one["strategy"].split()[0] for one in lines(RUNS / "word-problems" / "problems.jsonl")]
    found = {}
    print("\n| | alone, avg@16 | Add | Subtract | Multiply | cut off |\n" + "|---" * 6 + "|")
    for file in sorted((RUNS / "smollm2-examined").glob("*/summary.json")):
        summary = json.loads(file.read_text())
        one = summary["benchmarks"]["held-out"]
        correct: dict[str, list[bool]] = {"Add": [], "Subtract": [], "Multiply": []}
        for line in lines(file.parent / "held-out.jsonl"):
            correct[operations[int(line["id"].rpartition(":")[2]) - 1]] += line["correct"]
        shares = {name: mean(values) for name, values in correct.items()}
        found[file.parent.name] = {"engine": summary["engine"], "model": summary["model"]["digest"], **one}
        found[file.parent.name]["by_operation"] = shares
        mean_, low, high = (f"{one['avg'][key]:.1%}" for key in ("mean", "low", "high"))
        cells = " | ".join(f"{share:.0%}" for share in shares.values())
        print(f"| {file.parent.name} | {mean_} [{low}, {high}] | {cells} | {one['truncated']:.1%} |")
    (HERE / "examined.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for run in ("smollm2", "smollm2-sglang", "smollm2-sglang-1e-5"):
        if (RUNS / run / "summary.json").is_file():
            keep_run(run)
    keep_evaluations()
    keep_examined()
