"""Checksums of real SGLang servers, compared with those that `engines.sglang.weight_sync.layout` expects."""

import base64
import json
import os
import pickle
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sgpo_async.engines.sglang.processes.launch import CPU_LAUNCHER, STAND_INS
from sgpo_async.engines.sglang.weight_sync import layout
from sgpo_async.engines.sglang.weight_sync.layout import answered_checksums, compare, expected_checksums
from sgpo_async.engines.sglang.weight_sync.tensor_hash import cpu_hash
from sgpo_async.errors import WeightsError

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
START_S = 180
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "PYTHONPATH": str(STAND_INS),
}

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(not PYTHON.exists(), reason="no SGLang environment here: make sglang-cpu"),
]

SIZES = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)),
    "llama-bias": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
}


def saved(name, folder):
    """Save a model with random weights, biases and norms to `folder`; returns its tensors and its config.json."""
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tensors = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    return tensors, json.loads((folder / "config.json").read_text())


@contextmanager
def server(folder, *, tp=1, dtype="float32"):
    """Run a CPU server of the model in `folder`; yields a function (path, body) that posts and returns the answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(PYTHON, CPU_LAUNCHER, "--model-path", folder, "--host", "127.0.0.1", "--port", port),
        *(
            "--device",
            "cpu",
            "--dtype",
            dtype,
            "--max-total-tokens",
            1024,
            "--skip-tokenizer-init",
            "--sleep-on-idle",
            "--tp",
            tp,
        ),
    ]
    environment = ENVIRONMENT | {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(tp)))}

    def post(path, body, *, limit_s=60.0):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=limit_s) as answer:
            text = answer.read()
        return json.loads(text) if text else {}

    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            list(map(str, command)), env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/model_info", timeout=5).close()
                break
            except OSError:
                last = "\n".join((folder / "server.log").read_text(errors="replace").splitlines()[-20:])
                assert process.poll() is None, f"the server ended with {process.returncode}:\n{last}"
                assert time.monotonic() < deadline, f"no server within {START_S} s:\n{last}"
                time.sleep(0.5)
        yield post
    finally:
        os.killpg(process.pid, 9)
        process.wait(120)


@pytest.mark.parametrize(
    ("name", "tp", "dtype"),
    [
        ("qwen2", 1, "float32"),
        ("qwen2", 2, "float32"),
        ("qwen3", 1, "bfloat16"),
        ("qwen3-tied", 1, "float32"),
        ("llama-bias", 1, "float32"),
    ],
)
def test_a_server_answers_the_expected_checksums_until_one_element_changes(tmp_path, name, tp, dtype):
    tensors, config = saved(name, tmp_path)
    options = dict(tp=tp, dtype=getattr(torch, dtype), device="cpu")
    with server(tmp_path, tp=tp, dtype=dtype) as post:

        def answered():
            return answered_checksums(post("/weights_checker", {"action": "checksum"}))

        compare(expected_checksums(tensors, config, **options), answered())

        changed = "model.layers.1.mlp.up_proj.weight"
        tensors[changed][-1, -1] += 1
        with pytest.raises(
            WeightsError, match=rf"rank {tp - 1}: .* 1 \(model.layers.1.mlp.gate_up_proj.weight\) differ"
        ):
            compare(expected_checksums(tensors, config, **options), answered())

        if tp == 1:
            update(post, {changed: tensors[changed]})
            compare(expected_checksums(tensors, config, **options), answered())


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_layout_on_a_gpu_is_that_of_sglangs_own_models(tmp_path, monkeypatch, tp):
    monkeypatch.setitem(layout.HASHES, "cuda", cpu_hash)  # gpu_layout.py hashes tensors on a CPU
    models = {str(tmp_path / name): saved(name, tmp_path / name) for name in MODELS}
    command = [PYTHON, Path(__file__).with_name("gpu_layout.py"), str(tp), *models]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    held = json.loads(done.stdout.splitlines()[-1])
    for folder, (tensors, config) in models.items():
        compare(expected_checksums(tensors, config, tp=tp, dtype=torch.float32, device="cuda"), held[folder])


def update(post, tensors):
    """Load `tensors` into the server by HTTP."""
    payload = base64.b64encode(pickle.dumps(list(tensors.items()))).decode()
    for path, body in (
        ("/begin_weight_update", {}),
        ("/update_weights_from_tensor", {"serialized_named_tensors": [payload], "flush_cache": True}),
        ("/end_weight_update", {}),
    ):
        post(path, body)
