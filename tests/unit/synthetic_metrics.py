"""Synthetic metrics that resemble the metrics of a real run."""

import json
import math
import random
from pathlib import Path
from typing import Any


def synthetic_lines(steps: int = 120) -> list[dict[str, Any]]:
    rng = random.Random(5)
    lines = []
    for step in range(1, steps + 1):
        learned = 1 / (1 + math.exp(-(step - steps * 0.45) / (steps * 0.09)))
        noise = rng.gauss(0, 0.03)
        lags = {0: 200 if step < 4 else 30, 1: 3 * step, 2: 2 * step if step > 9 else 0, 3: max(0, step - 60)}
        line = {
            "step": step,
            "version": step,
            "wall_s": 1.7 * step + 6,
            "pass_auto": min(1, max(0, 0.06 + 0.84 * learned + noise)),
            "pass_guided": min(1, 0.93 + rng.gauss(0, 0.02)),
            "alpha": max(0.05, 0.78 - 0.72 * learned + noise),
            "lag_mean": 1.1 + 0.1 * noise,
            "lag_max": 3 if step > 60 else 2,
            "lag_histogram": {lag: count for lag, count in lags.items() if count},
            "tokens_per_s": 4200 + 300 * rng.gauss(0, 1),
            "learner_idle": 0.08 + abs(noise),
            "engine_idle": 0.03 + abs(noise) / 2,
            "learner_waits": {"batch": 0.08 + abs(noise), "publication": 0.01, "checkpoint": 0.0},
            "engine_waits": {"weights": 0.01, "leases": 0.02 + abs(noise) / 2},
            "uniform": 0.2 + 0.6 * learned,
            "cut": 0.01,
            "loss": 0.4 - 0.3 * learned + noise,
            "grpo_loss": noise,
            "kd_loss": 0.4 - 0.3 * learned,
            "kl_mean": 0.9 - 0.8 * learned + noise / 2,
            "kl_masked_fraction": 0.12 - 0.1 * learned,
            "kl_masked_mass": 0.62 - 0.4 * learned + noise,
            "entropy": 0.8 - 0.5 * learned + noise / 3,
            "correction_mean_lag0": 1.0,
            "correction_mean_stale": 1 + noise / 5,
            "kl_correction_mean_stale": 0.93 + noise / 3,
            "correction_min": 0.6 + noise,
            "kl_correction_min": 0.1 + noise / 2,
            "correction_clipped": 0.02 + abs(noise) / 9,
            "kl_correction_clipped": 0.05 + abs(noise) / 9,
            "ratio_by_lag": {"0": 1.0, "1": 1 + noise / 9, "2": 1 + noise / 4},
            **_engine_and_learner(step, noise),
            "grad_norm": 0.7 + abs(noise) * (30 if step == 50 else 3),
            "lr": 3e-4,
            "tokens_generated": 7400 * step,
            "tokens_trained": 7000 * step,
            "actors": 2,
            "ledger": _ledger(step),
        }
        if step % 20 == 0 or step == 1:
            line |= {"eval_pass_auto": 0.05 + 0.86 * learned, "eval_pass_guided": 0.94}
        lines.append(line)
    return lines


def _engine_and_learner(step: int, noise: float) -> dict[str, Any]:
    """How far the probabilities of engine and learner are apart; lag 0 is rare."""
    return {
        "mismatch_mean_lag0_first": 7e-8 * (1 + abs(noise)) if step % 20 == 1 else None,
        "mismatch_mean_lag0_later": 9e-8 if step == 41 else None,
        "mismatch_mean_stale_first": 0.01 + abs(noise) / 5,
        "mismatch_mean_stale_later": 0.008 + abs(noise) / 5,
        "mismatch_max_lag0_first": 1.5e-5 if step % 20 == 1 else None,
        "mismatch_bound": 1e-4,
        "canary_mean": 2e-7 * (1 + abs(noise)),
        "canary_max": 4e-7 * (1 + abs(noise)),
        "canary_alarms": {"differs": 0, "stuck": 0, "moved": 0},
        "mismatch_judged_first": 7e-8 * (1 + abs(noise)) if step % 20 == 1 else None,
        "mismatch_judged_later": 9e-8 if step == 41 else None,
    }


def _ledger(step: int) -> dict[str, Any]:
    return {
        "tasks": {
            "dispatched": 16 * step + 40,
            "trained": 16 * step,
            "dropped": {"stale": 3, "lease_lost": 0},
            "in_flight": 21,
            "buffered": 16,
        },
        "rollouts": {
            "dispatched": 192 * step + 480,
            "trained": 192 * step,
            "dropped": {"stale": 36, "lease_lost": 24},
            "in_flight": 228,
            "buffered": 192,
        },
    }


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
