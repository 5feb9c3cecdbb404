"""Facts of a model that the engine needs without loading it: names and shapes, end tokens, limits, checksums."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from sgpo_async.engines.base import Weights
from sgpo_async.engines.sglang.weight_sync.layout import Checksums, Device, expected_checksums
from sgpo_async.errors import DataError
from sgpo_async.model import parameters
from sgpo_async.model.folder import is_folder
from sgpo_async.model.load import end_tokens, longest, on_meta_device, tokenizer_of


@dataclass(frozen=True)
class ModelFacts:
    """Facts of the model in `folder`, and how servers run it: `tp` ranks, `dtype`, `device`."""

    folder: str
    config: Mapping[str, Any]  # as in config.json
    skeleton: PreTrainedModel  # on the meta device: names, shapes and dtypes, without values
    ends: frozenset[int]  # token ids that end a completion
    longest: int  # maximum number of tokens of a sequence
    vocabulary: int  # number of token ids
    tp: int
    dtype: torch.dtype
    device: Device
    digest: parameters.Digest

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise WeightsError unless names and shapes are the model's."""
        parameters.check(self.skeleton, tensors)

    def read(self, weights: Weights) -> Mapping[str, torch.Tensor]:
        """A complete, checked copy of the weights.

        Raises WeightsError if it is damaged or of another model, Superseded if the version has been overwritten.
        """
        tensors = weights.verified(self.digest)
        self.check(tensors)
        return tensors

    def expected(self, tensors: Mapping[str, torch.Tensor]) -> list[Checksums]:
        """The checksums that a server with `tensors` must report."""
        return expected_checksums(tensors, self.config, tp=self.tp, dtype=self.dtype, device=self.device)


def model_facts(folder: str, *, dtype: str, tp: int, device: Device, digest: parameters.Digest) -> ModelFacts:
    """Read a model's configuration. Raises DataError (one line) if it is not that of a causal language model."""
    local = is_folder(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=local)
        skeleton = on_meta_device(config, dtype)
        with contextlib.suppress(OSError):  # not every model has one
            skeleton.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=local)
    except Exception as error:  # transformers raises many types; each means that this model cannot be read
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"model.path: cannot read the model in {folder!r} ({type(error).__name__}: {reason}); set it to a "
            "causal language model of transformers, the same on every inference node"
        ) from error
    text = skeleton.config.get_text_config()
    return ModelFacts(
        folder=folder,
        config=text.to_dict(),
        skeleton=skeleton,
        ends=end_tokens(skeleton, tokenizer_of(folder)),
        longest=longest(skeleton),
        vocabulary=text.vocab_size,
        tp=tp,
        dtype=getattr(torch, dtype),
        device=device,
        digest=digest,
    )
