"""Engines with real servers, raw requests to a server, and reference values from transformers' plain forward pass."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sgpo_async.config.schema import Engine, Sglang
from sgpo_async.engines import Generate, Generated, Score, Scored, Weights
from sgpo_async.engines.sglang import SglangEngine
from sgpo_async.engines.sglang.processes.launch import Launch
from sgpo_async.engines.sglang.processes.process import ServerProcess
from sgpo_async.weights import digest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = str(ROOT / ".venv-sglang/bin/python")
PATIENCE_S = 120.0
VOCABULARY = 96
POSITIONS = 512


def saved(kind: str, folder: Path, *, seed: int) -> Path:
    """Save a tiny random model of two layers to `folder`; it has no end token."""
    torch.manual_seed(seed)
    common: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.2, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    if kind == "qwen2":
        model: Any = Qwen2ForCausalLM(Qwen2Config(**common, tie_word_embeddings=True))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**common, head_dim=8, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():  # biases start as zeros and norms as ones, which would hide errors
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    """The model in `folder`, loaded by transformers in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def version_of(folder: Path, version: int) -> Weights:
    """The parameters of the model in `folder`, as the learner would publish them."""
    tensors = {name: parameter.detach() for name, parameter in loaded(folder).named_parameters()}
    return Weights(version=version, digest=digest(tensors.items()), read=tensors.copy)


class Servers:
    """An engine with launched servers, ready for the first load."""

    def __init__(self, model: Path, logs: Path, *, slots: int = 64, **sglang: Any) -> None:
        settings = Sglang(**{"python": PYTHON, "stream_interval": 4, "phase_timeout_s": 30.0} | sglang)
        engine = Engine(kind="sglang", device="cpu", slots=slots, sglang=settings)
        self.engine = SglangEngine(str(model), engine, dtype="float32", digest=digest, logs=str(logs))
        self.all_events: list[str] = []

    def __enter__(self) -> Servers:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def events(self) -> list[str]:
        """All events of the engine so far."""
        self.all_events += self.engine.events()
        return self.all_events

    def load(self, folder: Path, version: int) -> None:
        """Load the weights in `folder` into every server, and wait until all have them."""
        self.engine.load(version_of(folder, version))
        self.until(lambda: self.versions() == {version}, f"version {version}")

    def versions(self) -> set[int | None]:
        """The versions of the servers; None for a server that is not in service."""
        servers = [server_slot.server for server_slot in self.engine.server_slots]
        return {server.version if server is not None and server.open else None for server in servers}

    def until(self, condition: Callable[[], Any], what: str, *, seconds: float = PATIENCE_S) -> None:
        """Wait until `condition` holds; `what` describes it in the error."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"timed out after {seconds:g} s: no {what}: {self.events()}"
            self.events()
            time.sleep(0.01)

    def results(self, count: int, *, seconds: float = PATIENCE_S) -> dict[Any, Generated | Scored]:
        """The next `count` results by id; no request may have two results."""
        results: dict[Any, Generated | Scored] = {}
        deadline = time.monotonic() + seconds
        while len(results) < count:
            assert time.monotonic() < deadline, f"{len(results)} of {count} results: {self.events()}"
            for result in self.engine.step(0.05):
                assert result.id not in results, f"{result.id} twice"
                results[result.id] = result
        return results

    def processes(self, index: int) -> list[psutil.Process]:
        """All processes of one server: watchdog, main process, scheduler and others."""
        process = self.engine.server_slots[index].process
        assert process is not None
        watchdog = psutil.Process(process.group)
        return [watchdog, *watchdog.children(recursive=True)]

    def kill(self, index: int) -> None:
        """Send SIGKILL to one server's main process."""
        self.processes(index)[1].kill()


def completion(id: Any, *, length: int = 6, tokens: int = 40, temperature: float = 1.0, seed: int = 0) -> Generate:
    """A request for a completion of a random prompt."""
    prompt = np.random.default_rng([seed, length]).integers(0, VOCABULARY, length).astype(np.int32)
    return Generate(id=id, prompt=prompt, max_new_tokens=tokens, temperature=temperature, seed=seed)


def score_request(id: Any, prompt: np.ndarray, *, length: int) -> Score:
    """A request to score `length` random tokens after `prompt`."""
    return Score(id=id, prompt=prompt, tokens=completion(0, length=length, seed=9).prompt, temperature=1.0)


def logprobs(model: Any, prompt: np.ndarray, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """log softmax(z/T) of `tokens` after `prompt`: one forward pass, softmax in float64."""
    return distributions(model, prompt, tokens, temperature)[range(tokens.size), tokens]


@torch.no_grad()
def distributions(model: Any, prompt: np.ndarray, tokens: np.ndarray, temperature: float) -> np.ndarray:
    """log softmax(z/T) of the whole vocabulary at each token: [T, V]."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens])).long()
    logits = model(ids[None, :-1], use_cache=False).logits[0, prompt.size - 1 :].double()
    found: np.ndarray = torch.log_softmax(logits / temperature, -1).numpy()
    return found


def assert_teacher_forced(
    models: dict[int, Any], requests: Iterable[Generate], results: dict[Any, Any], atol: float = 1e-4
) -> None:
    """The log-probabilities of sampled and of likely tokens are those of the weights that their spans name."""
    for request in requests:
        result = results[request.id]
        assert_most_likely(models, request, result, atol)
        of_version = {
            version: logprobs(models[version], request.prompt, result.tokens, request.temperature)
            for version in set(result.versions.tolist())
        }
        start = 0
        for version, end in zip(result.versions.tolist(), result.ends.tolist(), strict=True):
            expected = of_version[version][start:end]
            np.testing.assert_allclose(result.logprobs[start:end], expected, atol=atol, err_msg=f"{request.id}")
            start = end
        assert start == result.tokens.size


def assert_most_likely(models: dict[int, Any], request: Generate, result: Generated, atol: float = 1e-4) -> None:
    """The k most likely tokens at every position are those of the weights that its span names."""
    k = request.top_logprobs_num
    if not k:
        assert (result.top_tokens, result.top_logprobs) == (None, None)
        return
    tokens, found = (array.reshape(result.tokens.size, k) for array in (result.top_tokens, result.top_logprobs))
    for version, start, end in zip(result.versions.tolist(), [0, *result.ends[:-1]], result.ends, strict=True):
        expected = distributions(models[version], request.prompt, result.tokens[:end], request.temperature)[start:]
        np.testing.assert_allclose(found[start:end], -np.sort(-expected, -1)[:, :k], atol=atol)
        chosen = np.take_along_axis(expected, tokens[start:end].astype(np.int64), -1)
        np.testing.assert_allclose(found[start:end], chosen, atol=atol)


def assert_kept(models: dict[int, Any], request: Generate, result: Generated, atol: float = 1e-4) -> None:
    """The kept tokens are those of top-p and top-k, and the log-probabilities are renormalised over them.

    A token whose predecessors have top_p together up to rounding may be kept or not.
    """
    assert request.report_kept and result.kept is not None and result.kept_sizes is not None
    assert len(result.kept_sizes) == result.tokens.size
    sets = np.split(result.kept, np.cumsum(result.kept_sizes)[:-1])
    versions = np.repeat(result.versions, np.diff(result.ends, prepend=0))
    of_version = {
        version: distributions(models[version], request.prompt, result.tokens, request.temperature)
        for version in set(versions.tolist())
    }
    for at, (token, others) in enumerate(zip(result.tokens.tolist(), sets, strict=True)):
        log_p = of_version[int(versions[at])][at]
        kept = np.array([token, *others.tolist()])
        assert len(set(kept.tolist())) == len(kept)
        order = np.argsort(-log_p, kind="stable")[: request.top_k or None]
        before = np.cumsum(np.exp(log_p[order])) - np.exp(log_p[order])
        assert set(order[before < request.top_p - atol].tolist()) <= set(kept.tolist())
        assert set(kept.tolist()) <= set(order[before < request.top_p + atol].tolist())
        expected = log_p[token] - np.log(np.exp(log_p[kept]).sum())
        np.testing.assert_allclose(result.logprobs[at], expected, atol=atol, err_msg=f"{request.id}, token {at}")


def post(url: str, path: str, body: dict[str, Any], *, timeout_s: float = 30.0) -> tuple[int, dict[str, Any]]:
    """Send a raw request; returns status and answer."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + path, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            status, text = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    return status, json.loads(text) if text.startswith(b"{") else {}


def get(url: str, path: str, *, timeout_s: float = 30.0) -> dict[str, Any]:
    with urllib.request.urlopen(url + path, timeout=timeout_s) as response:
        answer: dict[str, Any] = json.loads(response.read())
        return answer


def launch_of(model: Path) -> Launch:
    settings = Sglang(python=PYTHON)
    return Launch(settings=settings, model=str(model), dtype="float32", device="cpu", slots=16, longest=512)


def start(model: Path, folder: Path) -> ServerProcess:
    """Launch a server as the engine does, but without an engine; wait until it is ready."""
    server = ServerProcess(launch_of(model), folder / "server.log")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert server.alive, server.log_tail()
        try:
            get(server.url, "/model_info")
        except OSError:
            time.sleep(0.2)
        else:
            return server
    raise AssertionError(server.log_tail())
