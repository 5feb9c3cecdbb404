"""Settings that cover every objective and every configurable part of SGPO."""

from sgpo_async.config.schema import Correction

VARIANTS: dict[str, dict[str, object]] = {
    "sgpo": {"delta": 0.5},
    "distillation alone": {"policy_gradient": False, "delta": 0.5},
    "reverse": {"divergence": "reverse", "limiter": "none"},
    "jensen-shannon": {"divergence": "jensen-shannon", "limiter": "none"},
    "sft on guided": {"divergence": "sft"},
    "sft on all guided": {"divergence": "sft", "target": "all"},
    "all targets": {"target": "all", "delta": 0.5},
    "all targets, no mask": {"target": "all", "limiter": "none"},
    "clamp": {"limiter": "clamp", "delta": 0.3},
    "smooth": {"limiter": "smooth", "delta": 0.7},
    "quantile": {"limiter": "quantile", "quantile": 0.6},
    "reverse, clamp": {"divergence": "reverse", "limiter": "clamp", "delta": 0.3},
    "fixed alpha": {"weight": "fixed", "alpha": 1.0, "limiter": "none"},
    "group advantage": {"weight": "group-advantage", "alpha_max": 5.0, "limiter": "none"},
    "no mask": {"limiter": "none"},
    "corrected pass rates": {
        "pass_rates": "corrected",
        "limiter": "none",
        "grpo_correction": Correction(mode="token", bound=4.0),
    },
    "frozen teacher": {"teacher": "frozen", "limiter": "none"},
    "frozen teacher, reverse": {"teacher": "frozen", "divergence": "reverse", "limiter": "smooth"},
    "behaviour teaches": {"teacher": "behaviour", "limiter": "none"},
    "behaviour teaches, reverse, all targets": {
        "teacher": "behaviour",
        "divergence": "reverse",
        "limiter": "clamp",
        "delta": 0.3,
        "target": "all",
    },
    "grpo": {"objective": "grpo"},
    "maxrl": {"objective": "grpo", "advantage": "mean"},
    "dr. grpo": {"objective": "grpo", "advantage": "none"},
    "sft": {"objective": "sft"},
    "luffy": {"objective": "luffy", "luffy_gamma": 0.2},
    "hpt": {"objective": "hpt"},
    "hpt, gate 1": {"objective": "hpt", "hpt_gate": 1},
}
