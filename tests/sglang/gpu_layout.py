"""Computes the checksums of a GPU server's ranks without a GPU, with SGLang's own model classes and weight checker.

Run it in SGLang's environment: python gpu_layout.py TP FOLDER... prints {FOLDER: [checksums of rank 0, ...]}. This one
process builds the model of each rank in turn and loads the weights as on a GPU; it runs no forward pass. The checksums
are SHA-256, because the tensors are on a CPU.
"""

import json
import sys
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from sglang.srt import runtime_context
from sglang.srt.layers import linear
from sglang.srt.models import llama, mistral, qwen2, qwen3
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.weight_checker import WeightChecker
from transformers import AutoConfig

MODELS = {
    model.__name__: model
    for model in (llama.LlamaForCausalLM, mistral.MistralForCausalLM, qwen2.Qwen2ForCausalLM, qwen3.Qwen3ForCausalLM)
}


def checksums_of(folder: str, tp: int, rank: int) -> dict[str, str]:
    """The checksums of the parameters of `rank`."""
    config = AutoConfig.from_pretrained(folder)
    args = ServerArgs(model_path=folder, device="cpu", tp_size=tp, skip_tokenizer_init=True, dtype="float32")
    context = runtime_context.create_context(
        args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=rank, dp_rank=None, gpu_id=None)
    )
    ranks = SimpleNamespace(rank_in_group=rank, world_size=tp)
    alone = SimpleNamespace(rank_in_group=0, world_size=1, is_first_rank=True, is_last_rank=True)
    groups = dict(tp_group=ranks, attn_tp_group=ranks, moe_tp_group=ranks, moe_ep_group=alone, pp_group=alone)
    with runtime_context.use_context(context), context.parallel.override(**groups):
        model = MODELS[config.architectures[0]](config)
        model.load_weights(load_file(f"{folder}/model.safetensors").items())
        return WeightChecker(get_model=lambda: model).handle("checksum", role="target")["checksums"]


if __name__ == "__main__":
    linear._is_cpu = False  # otherwise its loaders are those for a CPU
    for module in (llama, qwen2, qwen3):
        module.LogitsProcessor = lambda config: torch.nn.Identity()  # the original needs real process groups
    size, folders = int(sys.argv[1]), sys.argv[2:]
    print(json.dumps({folder: [checksums_of(folder, size, rank) for rank in range(size)] for folder in folders}))
