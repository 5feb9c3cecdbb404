"""A Hugging Face causal LM, trained with FSDP2: backbone, selected hidden states and fused losses in one forward.

FSDP2 gathers the parameters of a module only during its forward. The output matrix belongs to the root module.
Therefore everything that multiplies by this matrix (log-probabilities, entropy, Eq. 3) is computed inside the forward
of the root, whether or not the matrix is tied to the embedding. All logits are never held at once.
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

GROUP_BYTES = 32 * 2**20  # a smaller model is one FSDP group: more collectives would cost more time than overlap saves
LOCAL_GRADIENT_BYTES = 2**30  # a smaller model keeps unsharded gradients until the last micro-batch of the step


class Outputs(NamedTuple):
    """Values per completion token, for A tokens of policy gradient, K of distillation targets and L of given texts."""

    log_pi: Tensor  # [A], with gradient
    entropy: Tensor  # [A]
    d: Tensor  # [K], Eq. 3, with gradient
    log_teacher: Tensor  # [K]
    log_text: Tensor  # [L], with gradient


class Policy(nn.Module):
    """The trained policy, or a frozen teacher."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.eval()  # no dropout: pi must be the distribution that the engines sample from
        self.nbytes = sum(p.numel() * p.element_size() for p in model.parameters())  # over all ranks

    @property
    def head(self) -> Tensor:
        """The output matrix [V, H]; gathered only inside `forward`, or also after it for a model without gradient."""
        return self.model.get_output_embeddings().weight

    def hidden(self, packed: Packed) -> Tensor:
        """Compute the last hidden state at the position that predicts each completion token: [C, H]."""
        states = self.model.base_model(
            input_ids=self._tensor(packed.input_ids),
            position_ids=self._tensor(packed.position_ids),
            use_cache=False,
        ).last_hidden_state
        return states.flatten(0, 1).index_select(0, self._tensor(packed.picks))

    def own_logits(self, ids: np.ndarray) -> Tensor:
        """Compute the logits [T, V] of one sequence as the model itself does."""
        logits: Tensor = self.model(input_ids=self._tensor(ids).long()[None]).logits[0]
        return logits

    def forward(
        self, packed: Packed, sizes: tuple[int, int, int], teacher_targets: TeacherTargets | None, temperature: float
    ) -> Outputs:
        """Compute what the losses of a micro-batch need.

        Args:
            packed: the micro-batch; its completion tokens are of the three kinds of `Outputs`, in that order.
            sizes: A, K and L.
            teacher_targets: the teacher's values for the K target tokens; None if there are no targets.
            temperature: the sampling temperature of the rollouts.
        """
        hidden, targets = self.hidden(packed), self._tensor(packed.targets)
        sampled, target, text = hidden.split(sizes)
        sampled_tokens, target_tokens, text_tokens = targets.split(sizes)
        log_pi, entropy = linear_logprobs(sampled, self.head, sampled_tokens, temperature=temperature)
        d = log_teacher = log_text = log_pi.new_empty(0)
        if teacher_targets is not None:
            d, log_teacher = teacher_targets.compare(target, self.head, target_tokens, temperature=temperature)
        if len(text):
            log_text, _ = linear_logprobs(text, self.head, text_tokens, temperature=temperature)
        return Outputs(log_pi, entropy, d, log_teacher, log_text)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.head.device)


def shard(policy: Policy, mesh: DeviceMesh, *, precision: str) -> Policy:
    """Move the policy to the mesh's devices and shard it in place.

    Every rank must hold the same weights before, or parameters on the meta device, which remain there.

    Args:
        precision: the precision of matrix products, see `in_bfloat16`.
    """
    if in_bfloat16(precision, mesh):
        mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    else:  # parameters stored in bfloat16 are gathered as float32
        narrow = next(policy.parameters()).dtype == torch.bfloat16
        mixed = MixedPrecisionPolicy(torch.float32) if narrow else MixedPrecisionPolicy()
    if policy.nbytes >= GROUP_BYTES:
        for layer in decoder_layers(policy.model):
            fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(policy, mesh=mesh, mp_policy=mixed, reshard_after_forward=False)
    for method in ("hidden", "own_logits"):
        register_fsdp_forward_method(policy, method)
    return policy


def rows_on(rows: int, rank: int, ranks: int) -> range:
    """Return which of the `rows` of a parameter FSDP2 keeps on `rank`: a chunk of `torch.chunk`."""
    chunk = -(-rows // ranks)
    return range(min(rank * chunk, rows), min((rank + 1) * chunk, rows))


def recompute(policy: Policy) -> None:
    """Store only the inputs of each decoder layer, and recompute its activations in the backward pass.

    Call this before `shard`. It costs one additional forward; the gradients are the same.
    """
    for layer in decoder_layers(policy.model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def in_bfloat16(precision: str, mesh: DeviceMesh) -> bool:
    """Return whether matrix products use bfloat16; "auto" means bfloat16 on GPUs that support it, else float32."""
    supported = mesh.device_type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bfloat16" or (precision == "auto" and supported)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules that transformers declares as indivisible blocks."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def check_model(policy: Policy) -> None:
    """Raise DataError unless packing and the fused output layer reproduce the model's own log-probabilities.

    A collective of all ranks if the policy is sharded.

    This rejects models whose state leaks from one packed sequence into the next, that accept no position ids, or whose
    logits are not simply hidden @ matrix (because of a bias, a cap or a scale).
    """
    ids = np.array([1, 0, 1, 0, 1], np.int32)
    tokens = [Tokens(ids[:2], ids[2:]), Tokens(ids[:1], ids[1:3])]
    packed = pack(tokens, (tuple(range(len(tokens))),))
    with torch.no_grad():
        try:
            found = policy(packed, (len(packed.targets), 0, 0), None, 1.0).log_pi
        except (TypeError, AttributeError) as error:
            name = type(policy.model).__name__
            raise DataError(f"model.path: {name} cannot be trained on packed sequences: {error}") from error
        expected = torch.cat([_own_logprobs(policy, own.prompt, own.completion) for own in tokens])
    if not torch.allclose(found, expected.to(found.dtype), rtol=1e-3, atol=1e-3):
        raise DataError(
            f"model.path: {type(policy.model).__name__} is not supported: its log-probabilities change when sequences "
            f"are packed, or its logits are not hidden @ matrix; use another architecture"
        )


def _own_logprobs(policy: Policy, prompt: np.ndarray, completion: np.ndarray) -> Tensor:
    ids = np.concatenate((prompt, completion))
    log_probs = policy.own_logits(ids).log_softmax(-1)
    at = torch.arange(len(prompt), len(ids), device=log_probs.device)
    return log_probs[at - 1, torch.from_numpy(ids[len(prompt) :]).long().to(log_probs.device)]
