"""A Hugging Face causal LM as FSDP2 trains it: backbone, picked hidden states and fused losses in one forward.

FSDP2 gathers the parameters of a module for the time of its forward. The output matrix belongs to the root, so what
multiplies by it (log-probabilities, entropy, Eq. 3) happens inside the root's forward, whether the matrix is tied
to the embedding or not; logits never exist whole.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sgpo_async.algorithm import linear_logprobs
from sgpo_async.errors import DataError
from sgpo_async.learner.packing import Packed, Tokens, pack
from sgpo_async.learner.teacher_targets import TeacherTargets

GROUP_BYTES = 32 * 2**20  # a smaller model is one FSDP group: its collectives would cost more than they overlap
LOCAL_GRADIENT_BYTES = 2**30  # a smaller model keeps its gradients whole until the step's last micro-batch


class Outputs(NamedTuple):
    """Per completion token of each kind: A of the policy gradient, then K of targets, then L of given texts."""

    log_pi: Tensor  # [A], with gradient
    entropy: Tensor  # [A]
    d: Tensor  # [K], Eq. 3, with gradient
    log_teacher: Tensor  # [K]
    log_text: Tensor  # [L], with gradient


class Policy(nn.Module):
    """The trained policy, or a frozen teacher."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval()  # no dropout: pi_theta is the distribution that the engines sample from
        self.nbytes = sum(p.numel() * p.element_size() for p in model.parameters())  # over all ranks

    @property
    def head(self) -> Tensor:
        """The output matrix [V, H]; whole only inside `forward`, or after it for a model without gradient."""
        return self.model.get_output_embeddings().weight

    def hidden(self, packed: Packed) -> Tensor:
        """The last hidden state at the position that predicts each completion token: [C, H]."""
        states = self.model.base_model(
            input_ids=self._tensor(packed.input_ids),
            position_ids=self._tensor(packed.position_ids),
            use_cache=False,
        ).last_hidden_state
        return states.flatten(0, 1).index_select(0, self._tensor(packed.picks))

    def forward(
        self, packed: Packed, sizes: tuple[int, int, int], teacher_targets: TeacherTargets | None, temperature: float
    ) -> Outputs:
        """What the losses need of a micro-batch.

        Args:
            packed: its completion tokens are of the three kinds of `Outputs`, in that order.
            sizes: A, K and L.
            teacher_targets: of the targets; None without any.
            temperature: that of the rollouts.
        """
        hidden, targets = self.hidden(packed), self._tensor(packed.targets)
        own, target, text = hidden.split(sizes)
        own_tokens, target_tokens, text_tokens = targets.split(sizes)
        log_pi, entropy = linear_logprobs(own, self.head, own_tokens, temperature=temperature)
        d = log_teacher = log_text = log_pi.new_empty(0)
        if teacher_targets is not None:
            d, log_teacher = teacher_targets.compare(target, self.head, target_tokens, temperature=temperature)
        if len(text):
            log_text, _ = linear_logprobs(text, self.head, text_tokens, temperature=temperature)
        return Outputs(log_pi, entropy, d, log_teacher, log_text)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.head.device)


def shard(policy: Policy, mesh: DeviceMesh, *, precision: str) -> Policy:
    """Move the policy to the mesh's devices and shard it in place; every rank holds equal weights before.

    Args:
        precision: of matrix products, see `in_bfloat16`.
    """
    if in_bfloat16(precision, mesh):
        mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    else:  # what is stored in bfloat16 is gathered as float32
        narrow = next(policy.parameters()).dtype == torch.bfloat16
        mixed = MixedPrecisionPolicy(torch.float32) if narrow else MixedPrecisionPolicy()
    if policy.nbytes >= GROUP_BYTES:
        for layer in decoder_layers(policy.model):
            fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(policy, mesh=mesh, mp_policy=mixed, reshard_after_forward=False)
    register_fsdp_forward_method(policy, "hidden")
    return policy


def recompute(policy: Policy) -> None:
    """Keep of each decoder layer only what goes into it, and compute the rest again in the backward pass.

    Call it before `shard`. It costs one more forward; the gradients are the same.
    """
    for layer in decoder_layers(policy.model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def in_bfloat16(precision: str, mesh: DeviceMesh) -> bool:
    """Whether matrix products are; `precision` is "float32", "bfloat16", or "auto": bfloat16 on GPUs that have it."""
    able = mesh.device_type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bfloat16" or (precision == "auto" and able)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that transformers declares indivisible."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def check_model(policy: Policy) -> None:
    """Raise DataError unless packing and the fused output layer give this model's own log-probabilities.

    That excludes models whose state leaks from one packed sequence into the next, whose positions cannot be given,
    or whose logits are more than hidden @ matrix (a bias, a cap, a scale).
    """
    ids = np.array([1, 0, 1, 0, 1], np.int32)
    tokens = [Tokens(ids[:2], ids[2:]), Tokens(ids[:1], ids[1:3])]
    packed = pack(tokens, (tuple(range(len(tokens))),))
    with torch.no_grad():
        try:
            found = policy(packed, (len(packed.targets), 0, 0), None, 1.0).log_pi
        except (TypeError, AttributeError) as error:
            raise DataError(f"model.path: {type(policy.model).__name__} cannot be trained packed: {error}") from error
        expected = torch.cat([_own_logprobs(policy.model, *sequence) for sequence in tokens])
    if not torch.allclose(found, expected.to(found.dtype), rtol=1e-3, atol=1e-3):
        raise DataError(
            f"model.path: {type(policy.model).__name__} gives other log-probabilities when sequences are packed or "
            f"its logits are not hidden @ matrix; such an architecture is not supported"
        )


def _own_logprobs(model: PreTrainedModel, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    ids = torch.from_numpy(np.concatenate((prompt, completion))).long().to(model.device)
    log_probs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    at = torch.arange(len(prompt), len(ids), device=ids.device)
    return log_probs[at - 1, ids[at]]
