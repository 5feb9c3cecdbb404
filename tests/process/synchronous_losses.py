"""The synchronous loop under torchrun, a JSON line per step: python -m torch.distributed.run ... CONFIG."""

import json
import sys

import torch.distributed as dist

from sgpo_async.bench.worker_learner import Colocated
from sgpo_async.config import load

if __name__ == "__main__":
    for _, metrics in Colocated(load(sys.argv[1])).steps():
        print(json.dumps({key: metrics[key] for key in ("loss", "grpo_loss", "kd_loss", "entropy", "grad_norm")}))
    dist.destroy_process_group()
