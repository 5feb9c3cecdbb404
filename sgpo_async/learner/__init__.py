"""The learner, started by torchrun: FSDP2, packed micro-batches, one SGPO step per batch, weights published each step."""

from sgpo_async.learner.train import train

__all__ = ["train"]
