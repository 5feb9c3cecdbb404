"""Run the synchronous loop with world size 1 and print one JSON line per step: synchronous_losses.py CONFIG."""

import json
import sys

import torch
import torch.distributed as dist

from sgpo_async.bench.worker_learner import Colocated
from sgpo_async.config import load
from sgpo_async.learner.process_group import join_alone

if __name__ == "__main__":
    torch.set_num_threads(1)
    for _, metrics in Colocated(load(sys.argv[1]), join_alone()).steps():
        print(json.dumps({key: metrics[key] for key in ("loss", "grpo_loss", "kd_loss", "entropy", "grad_norm")}))
    dist.destroy_process_group()
