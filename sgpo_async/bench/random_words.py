"""A model of random words, of which about as many change from version to version as AdamW changes at lr 1e-6."""

from __future__ import annotations

import numpy as np
import torch

CHANGED = 100  # of so many words, one changes


class RandomWords:
    """One tensor of `mbytes` (2^20 bytes) in bfloat16."""

    def __init__(self, mbytes: int) -> None:
        self._random = np.random.default_rng(0)
        self._words = self._random.integers(0, 2**16, mbytes * 2**19, dtype=np.uint16)

    def next(self) -> list[tuple[str, torch.Tensor]]:
        """The named tensors of the next version."""
        self._words[self._random.integers(0, len(self._words), len(self._words) // CHANGED)] += 1
        return [("weights", torch.from_numpy(self._words).view(torch.bfloat16))]
