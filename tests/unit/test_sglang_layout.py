"""SGLang's layout of a model, compared with a transcription of SGLang's weight loaders."""

import threading

import pytest
import torch
from engines_models import weights
from transformers import AutoConfig, AutoModelForCausalLM

from sgpo_async.engines.sglang.weight_sync.layout import answered_checksums, compare, expected_checksums, layout_of
from sgpo_async.engines.sglang.weight_sync.tensor_hash import cpu_hash, cuda_hash
from sgpo_async.errors import EngineError, WeightsError

SIZES = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3,
)  # fmt: skip
MODELS = {
    "qwen2": {},
    "qwen2-tied": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=16),
    "qwen3-tied": dict(head_dim=8, tie_word_embeddings=True),
    "qwen3-bias": dict(head_dim=8, attention_bias=True),
    "llama": {},
    "llama-bias": dict(attention_bias=True),
    "mistral": dict(head_dim=12),
}


def tiny(name):
    """A model with random parameters, including biases and norms, and its config.json."""
    config = AutoConfig.for_model(name.partition("-")[0], **SIZES | MODELS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    config.architectures = [type(model).__name__]
    return model, config.to_dict()


class Rank:
    """One rank of a server: parameters with SGLang's shapes, filled as SGLang's loaders fill them.

    Each method transcribes the function of sglang 0.5.23 that its docstring names, for unquantised weights.
    """

    def __init__(self, config, *, tp, rank, dtype, device):
        self.config, self.tp, self.rank, self.dtype, self.params = config, tp, rank, dtype, {}
        if device == "cpu":  # configs/update_config.py: adjust_config_with_unaligned_cpu_tp, DEFAULT_MOE_PADDING_SIZE
            unit = 32 * tp
            self.config = config | {"intermediate_size": (config["intermediate_size"] + unit - 1) // unit * unit}

    def param(self, name, shape):
        return self.params.setdefault(name, torch.full(shape, float("nan"), dtype=self.dtype))

    def vocabulary(self, name, loaded):
        """VocabParallelEmbedding.__init__, _get_indices and weight_loader."""
        size, unit = self.config["vocab_size"], 64
        if (size + 63) // 64 * 64 % self.tp:
            unit *= self.tp
        each = (size + unit - 1) // unit * unit // self.tp
        start, end = min(self.rank * each, size), min((self.rank + 1) * each, size)
        param = self.param(name, (each, self.config["hidden_size"]))
        param[: end - start] = loaded[start:end]
        param[end - start :] = 0

    def qkv(self, name, loaded, shard):
        """QKVParallelLinear.__init__ and weight_loader."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size = self.config.get("head_dim") or self.config["hidden_size"] // heads
        num_heads = heads // self.tp
        num_kv_heads, replicas = (1, self.tp // kv_heads) if self.tp >= kv_heads else (kv_heads // self.tp, 1)
        param = self.param(name, ((num_heads + 2 * num_kv_heads) * size, *loaded.shape[1:]))
        offset = {"q": 0, "k": num_heads * size, "v": (num_heads + num_kv_heads) * size}[shard]
        length = (num_heads if shard == "q" else num_kv_heads) * size
        start = (self.rank if shard == "q" else self.rank // replicas) * length
        param[offset : offset + length] = loaded[start : start + length]

    def gate_up(self, name, loaded, shard):
        """MergedColumnParallelLinear.weight_loader."""
        length = self.config["intermediate_size"] // self.tp
        param = self.param(name, (2 * length, loaded.shape[1]))
        rows = loaded[self.rank * length : (self.rank + 1) * length]
        part = param[shard * length : (shard + 1) * length]
        part[len(rows) :] = 0
        part[: len(rows)] = rows

    def row_parallel(self, name, loaded, size):
        """RowParallelLinear.weight_loader."""
        length = size // self.tp
        param = self.param(name, (loaded.shape[0], length))
        columns = loaded[:, self.rank * length : (self.rank + 1) * length]
        param[:, columns.shape[1] :] = 0
        param[:, : columns.shape[1]] = columns

    def load(self, tensors):
        """models/qwen2.py: Qwen2ForCausalLM._legacy_load_weights."""
        for name, loaded in tensors.items():
            for shard in "qkv":
                if f"{shard}_proj" in name:
                    self.qkv(name.replace(f"{shard}_proj", "qkv_proj"), loaded, shard)
                    break
            else:
                if "gate_proj" in name or "up_proj" in name:
                    fused = name.replace("gate_proj", "gate_up_proj").replace(".up_proj", ".gate_up_proj")
                    self.gate_up(fused, loaded, int("gate_proj" not in name))
                elif "down_proj" in name:
                    self.row_parallel(name, loaded, self.config["intermediate_size"])
                elif name.endswith("o_proj.weight"):
                    self.row_parallel(name, loaded, loaded.shape[1])
                elif "embed_tokens" in name or "lm_head" in name:
                    self.vocabulary(name, loaded)
                else:
                    self.param(name, loaded.shape).copy_(loaded)
        return self.params


@pytest.mark.parametrize(("device", "tp"), [("cpu", 1), ("cpu", 2), ("cuda", 1), ("cuda", 2), ("cuda", 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_expected_checksums_equal_those_of_the_loaded_parameters(name, tp, dtype, device):
    model, config = tiny(name)
    hash_of = {"cpu": cpu_hash, "cuda": cuda_hash}[device]
    expected = expected_checksums(weights(model), config, tp=tp, dtype=dtype, device=device)
    for rank in range(tp):
        held = Rank(config, tp=tp, rank=rank, dtype=dtype, device=device).load(weights(model))
        assert not any(parameter.isnan().any() for parameter in held.values())
        assert expected[rank] == {key: hash_of(parameter) for key, parameter in held.items()}
    assert len(expected) == tp


def test_only_ranks_that_share_a_key_head_hold_the_same_keys():
    model, config = tiny("llama")
    tensors = weights(model)
    for tensor in tensors.values():
        tensor.zero_()
    tensors["model.layers.0.self_attn.k_proj.weight"][:8] = 1  # the first of two heads
    name = "model.layers.0.self_attn.qkv_proj.weight"
    first, second, third, fourth = expected_checksums(tensors, config, tp=4, dtype=torch.float32, device="cuda")
    assert first[name] == second[name] != third[name] == fourth[name]


def test_each_tensor_is_looked_up_once():
    model, config = tiny("qwen3-bias")
    lookups = []

    class RecordingDict(dict):
        def __getitem__(self, name):
            lookups.append(name)
            return super().__getitem__(name)

    tensors = RecordingDict(weights(model))
    expected_checksums(tensors, config, tp=2, dtype=torch.float32, device="cpu")
    assert sorted(lookups) == sorted(tensors)


def test_parameters_are_hashed_by_several_threads():
    model, config = tiny("qwen3-bias")
    two = threading.Barrier(2, timeout=60)

    class Waiting(dict):
        def __getitem__(self, name):
            if name in ("lm_head.weight", "model.norm.weight"):
                two.wait()
            return super().__getitem__(name)

    options = dict(tp=2, dtype=torch.float32, device="cpu")
    assert expected_checksums(Waiting(weights(model)), config, **options) == expected_checksums(
        weights(model), config, **options
    )


def test_the_output_matrix_is_not_read_if_the_embeddings_are_tied():
    model, config = tiny("qwen3-tied")
    options = dict(tp=1, dtype=torch.float32, device="cpu")
    expected = expected_checksums(weights(model), config, **options)
    assert expected_checksums(weights(model) | {"lm_head.weight": torch.zeros(1)}, config, **options) == expected
    assert "lm_head.weight" not in expected[0]


def test_a_config_json_written_by_transformers_is_sufficient(tmp_path):
    model, config = tiny("llama")
    model.save_pretrained(tmp_path)
    written, _ = type(model.config).get_config_dict(tmp_path)
    options = dict(tp=2, dtype=torch.float32, device="cuda")
    assert expected_checksums(weights(model), written, **options) == expected_checksums(
        weights(model), config, **options
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(architectures=["GPT2LMHeadModel"]),
            "GPT2LMHeadModel is not supported.*supported: Llama.*Qwen3ForCausalLM",
        ),
        (dict(architectures=None), "a model without architectures in config.json is not supported"),
        (dict(num_key_value_heads=3), "2 ranks on a cuda cannot share 4 attention heads with 3 key"),
        (dict(num_attention_heads=5), "2 ranks on a cuda cannot share 5 attention heads"),
        (dict(intermediate_size=49), "2 ranks cannot share intermediate_size 49"),
    ],
)
def test_the_error_for_an_unsupported_model_is_one_line(change, message):
    model, config = tiny("llama")
    with pytest.raises(EngineError, match=message) as error:
        expected_checksums(weights(model), config | change, tp=2, dtype=torch.float32, device="cuda")
    assert "\n" not in str(error.value)


def test_more_ranks_than_key_heads_are_refused_on_a_cpu():
    model, config = tiny("llama")
    with pytest.raises(EngineError, match="4 ranks on a cpu cannot share"):
        expected_checksums(weights(model), config, tp=4, dtype=torch.float32, device="cpu")


def test_tensors_of_another_model_are_refused():
    model, config = tiny("llama-bias")
    tensors = weights(model)
    tensors["extra"] = tensors.pop("model.norm.weight")
    options = dict(tp=1, dtype=torch.float32, device="cpu")
    with pytest.raises(WeightsError, match=r"1 \(model.norm.weight\) missing, 1 \(extra\) unknown to Llama"):
        expected_checksums(tensors, config, **options)
    tensors["model.norm.weight"] = tensors.pop("extra")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:]
    with pytest.raises(WeightsError, match=r"lm_head.weight: got shape \(99, 32\), but config.json says 100"):
        expected_checksums(tensors, config, **options)


def test_equal_checksums_pass_and_errors_name_rank_and_parameter():
    held = {f"p{index}": "0" * 16 for index in range(6)}
    compare([held, held], [held.copy(), held.copy()])
    message = r"rank 1: of 6 parameters, 1 \(p3\) differ from what was sent and none are missing; none are unexpected"
    with pytest.raises(WeightsError, match=message):
        compare([held, held], [held, held | {"p3": "1" * 16}])
    message = r"rank 0: .* none differ.* 6 \(p0, p1, p2, ...\) are missing; 1 \(q\) are unexpected"
    with pytest.raises(WeightsError, match=message):
        compare([held], [{"q": "0" * 16}])
    with pytest.raises(WeightsError, match="1 ranks answered, expected 2"):
        compare([held, held], [held])


def test_the_checksums_of_a_response_are_ordered_by_rank():
    ranks = [dict(checksums={"p": str(rank)}, parallelism_info=[{"tp_rank": rank}]) for rank in (1, 0)]
    assert answered_checksums({"success": True, "ranks": ranks}) == [{"p": "0"}, {"p": "1"}]
    with pytest.raises(EngineError, match="gave no checksums: busy"):
        answered_checksums({"success": False, "message": "busy"})


SHIPPED = {  # from config.json of the models in configs/paper-*.yaml
    "qwen2": dict(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "llama": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "ranks", "billions"), [("qwen2", (1, 2, 4), 7.62), ("llama", (1, 2, 4, 8), 8.03)])
def test_the_layout_covers_every_parameter_of_the_models_in_shipped_configs(kind, ranks, billions):
    config = AutoConfig.for_model(kind, **SHIPPED[kind])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert round(sum(shape.numel() for shape in shapes.values()) / 1e9, 2) == billions
    config.architectures = [type(model).__name__]
    for tp in ranks:
        cuts = [cut for cuts in layout_of(config.to_dict(), tp=tp, device="cuda").values() for cut in cuts]
        assert sorted(cut.source for cut in cuts) == sorted(shapes)
        assert all(cut.dim is None or shapes[cut.source][cut.dim] == cut.size for cut in cuts)
        assert all(cut.padded % cut.pieces == 0 for cut in cuts)
