"""AdamW, its learning-rate schedule, and gradient clipping."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sgpo_async.config.schema import Optim
from sgpo_async.learner.adamw import AdamW


def build(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """Create AdamW for the trained parameters, without weight decay on vectors (norms, biases), as is common."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (optim.beta1, optim.beta2)
    if optim.state == "float32":
        return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, fused=True)
    return AdamW(groups, lr=optim.lr, betas=betas, form=optim.state)


def learning_rate(optim: Optim, *, step: int, steps: int) -> float:
    """Return the learning rate of step `step` (counted from 0) of `steps`: linear warm-up, then the schedule."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
    shape = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return optim.lr * shape[optim.schedule]


def clip_gradients(module: nn.Module, bound: float) -> float:
    """Scale the gradient to norm `bound` if its norm is larger; return the norm before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), bound)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
