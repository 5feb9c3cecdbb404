"""The learner, started by torchrun: it trains with FSDP2 on packed micro-batches and publishes each step's weights."""

from sgpo_async.learner.process_group import join_world
from sgpo_async.learner.resume import continues
from sgpo_async.learner.train import train

__all__ = ["continues", "join_world", "train"]
