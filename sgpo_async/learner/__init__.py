"""The torchrun side: FSDP2, packed micro-batches, one step of SGPO at a time, weights published after each."""

from sgpo_async.learner.train import train

__all__ = ["train"]
