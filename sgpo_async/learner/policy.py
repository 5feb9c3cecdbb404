"""A Hugging Face causal LM, trained with FSDP2: backbone, selected hidden states and fused losses in one forward.

FSDP2 gathers the parameters of a module only during its forward. The output matrix belongs to the root module.
Therefore everything that multiplies by this matrix (log-probabilities, entropy, Eq. 3, and the gradients of the losses)
is computed inside the forward of the root, whether or not the matrix is tied to the embedding. All logits are never
held at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sgpo_async.algorithm import Found, Kept, LogProbability, Part, linear_loss
from sgpo_async.config.schema import Lora
from sgpo_async.errors import DataError
from sgpo_async.learner.attention import Segments, use_packed_attention
from sgpo_async.learner.packing import Packed, Tokens, pack

GROUP_BYTES = 32 * 2**20  # a smaller model is one FSDP group: more collectives would cost more time than overlap saves
LOCAL_GRADIENT_BYTES = 2**30  # a smaller model keeps unsharded gradients until the last micro-batch of the step


class Policy(nn.Module):
    """The trained policy, or a frozen teacher.

    Attributes:
        device: where it computes.
        home: where its parameters are, gathered ones aside.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval()  # no dropout: pi must be the distribution that the engines sample from
        self.device = self.home = self.head.device
        self._own_attention = model.config._attn_implementation
        use_packed_attention(model)
        self.lora = Lora()  # of the adapters that the model has; rank 0: none
        self.windows: set[int | None] = set()  # the sliding windows of the layers that have run
        self.nbytes = sum(p.numel() * p.element_size() for p in model.parameters())  # over all ranks

    @property
    def head(self) -> Tensor:
        """The output matrix [V, H]; gathered only inside `forward`, or also after it for a model without gradient."""
        return self.model.get_output_embeddings().weight

    def hidden(self, packed: Packed) -> Tensor:
        """Compute the last hidden state at the position that predicts each completion token: [C, H]."""
        edges = self._tensor(np.cumsum([0, *packed.lengths], dtype=np.int32))
        layouts = [self._tensor(index) for index in packed.shared or ()]
        states = self.model.base_model(
            input_ids=self._tensor(packed.input_ids),
            position_ids=self._tensor(packed.position_ids).view(1, -1),  # with strides that compiled layers expect
            use_cache=False,
            segments=Segments(packed.lengths, edges, self.windows, *layouts),
        ).last_hidden_state
        return states[0].index_select(0, self._tensor(packed.picks))

    def own_logits(self, ids: np.ndarray) -> Tensor:
        """Compute the logits [T, V] of one sequence as the model itself does, with its own attention."""
        self.model.set_attn_implementation(self._own_attention)
        try:
            logits: Tensor = self.model(input_ids=self._tensor(ids).long()[None]).logits[0]
        finally:
            use_packed_attention(self.model)
        return logits

    def forward(self, packed: Packed, parts: Sequence[Part], temperature: float) -> tuple[Tensor, list[Found]]:
        """Compute the loss of a micro-batch, the sum over its parts, and the values of each part.

        Args:
            packed: the micro-batch.
            parts: consecutive completion tokens that share a loss, all of them together.
            temperature: the sampling temperature of the rollouts.
        """
        return linear_loss(self.hidden(packed), self.head, parts, temperature=temperature)

    @torch.no_grad()
    def log_probabilities(self, packed: Packed, temperature: float, kept: Kept | None = None) -> Tensor:
        """Compute log pi of each completion token of a micro-batch: [C]; renormalised over `kept`, if given."""
        measure = LogProbability(self._tensor(packed.targets), kept)
        _, (found,) = self(packed, [Part(measure, lambda log_pi, _: log_pi.sum())], temperature)
        return found.value

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def shard(policy: Policy, mesh: DeviceMesh, *, precision: str, offload: bool = False) -> Policy:
    """Move the policy to the mesh's devices and shard it in place.

    Every rank must hold the same weights before, or parameters on the meta device, which remain there.

    Args:
        precision: the precision of matrix products, see `in_bfloat16`.
        offload: keep the shards of parameters and gradients in host memory.
    """
    policy.device = torch.device(mesh.device_type)
    policy.home = torch.device("cpu") if offload else policy.device
    if in_bfloat16(precision, mesh):
        mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    else:  # parameters stored in bfloat16 are gathered as float32
        narrow = next(policy.parameters()).dtype == torch.bfloat16
        mixed = MixedPrecisionPolicy(torch.float32) if narrow else MixedPrecisionPolicy()
    home = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if offload else OffloadPolicy()
    if policy.nbytes >= GROUP_BYTES:
        for layer in decoder_layers(policy.model):
            fully_shard(layer, mesh=mesh, mp_policy=mixed, offload_policy=home)
    fully_shard(policy, mesh=mesh, mp_policy=mixed, offload_policy=home, reshard_after_forward=False)
    for method in ("hidden", "own_logits"):
        register_fsdp_forward_method(policy, method)
    return policy


def rows_on(rows: int, rank: int, ranks: int) -> range:
    """Return which of the `rows` of a parameter FSDP2 keeps on `rank`: a chunk of `torch.chunk`."""
    chunk = -(-rows // ranks)
    return range(min(rank * chunk, rows), min((rank + 1) * chunk, rows))


def recompute(policy: Policy, every: int, *, offload: bool = False) -> None:
    """Store only the inputs of every n-th decoder layer, and recompute its activations in the backward pass.

    Call this before `shard`; 0 changes nothing. It costs a second forward of these layers; the gradients are the same.

    Args:
        offload: keep the stored inputs in host memory until the backward pass.
    """
    way = _from_host if offload else partial(checkpoint, use_reentrant=False)
    for layer in decoder_layers(policy.model)[::every] if every else []:
        layer.forward = partial(way, layer.forward)


def _from_host(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `forward` of a layer; recompute its activations in the backward pass from inputs that are in host memory.

    The hooks of `checkpoint` are inside those of `save_on_cpu` and take every tensor that the layer itself saves, so
    only the inputs that `checkpoint` stores reach the outer ones: no gathered parameter is copied.
    """
    with save_on_cpu(pin_memory=True):
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def in_bfloat16(precision: str, mesh: DeviceMesh) -> bool:
    """Return whether matrix products use bfloat16; "auto" means bfloat16 on GPUs that support it, else float32."""
    supported = mesh.device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision == "bfloat16" or (precision == "auto" and supported)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that transformers declares as indivisible blocks."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def check_model(policy: Policy) -> None:
    """Raise DataError unless packing and the fused output layer reproduce the model's own log-probabilities.

    A collective of all ranks if the policy is sharded.

    This rejects models whose state leaks from one packed sequence into the next, that accept no position ids, that
    compute their attention in a way of their own, or whose logits are not simply hidden @ matrix (because of a bias, a
    cap or a scale).
    """
    name = type(policy.model).__name__
    ids = np.array([1, 0, 1, 0, 1], np.int32)
    tokens = [Tokens(ids[:2], ids[2:]), Tokens(ids[:1], ids[1:3])]
    packed = pack(tokens)
    with torch.no_grad():
        try:
            found = policy.log_probabilities(packed, 1.0)
        except (TypeError, AttributeError) as error:
            raise DataError(f"model.path: {name} cannot be trained on packed sequences: {error}") from error
        expected = torch.cat([_own_logprobs(policy, own.prompt, own.completion) for own in tokens])
    if not torch.allclose(found, expected.to(found.dtype), rtol=1e-3, atol=1e-3):
        raise DataError(
            f"model.path: {name} is not supported: its log-probabilities change when sequences are packed, or its "
            "logits are not hidden @ matrix; use another architecture"
        )
    if _is_windowed(policy.model) and policy.windows <= {None}:
        raise DataError(
            f"model.path: {name} is not supported: it has a sliding window that only its masks know; "
            "use another architecture"
        )


def _is_windowed(model: PreTrainedModel) -> bool:
    """Whether the configuration says that some layers have a sliding window."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else bool(getattr(config, "sliding_window", None))


def _own_logprobs(policy: Policy, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    ids = np.concatenate((prompt, completion))
    log_probs = policy.own_logits(ids).log_softmax(-1)
    at = torch.arange(len(prompt), len(ids), device=log_probs.device)
    return log_probs[at - 1, torch.from_numpy(ids[len(prompt) :]).long().to(log_probs.device)]
