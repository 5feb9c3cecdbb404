"""Checks what a run needs from this machine, before anything starts. Each check returns what it found."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sgpo_async.bench.cost import Assumptions
from sgpo_async.bench.memory import RESERVED, learner_memory
from sgpo_async.bench.plan import published_bytes
from sgpo_async.cli import preflight, resources
from sgpo_async.cli.resources import existing, free, require_writable, size
from sgpo_async.config import Hub, Run
from sgpo_async.engines.sglang.preflight import Finding, finding_of
from sgpo_async.engines.sglang.weight_sync.folder import ROOM, default_root
from sgpo_async.engines.sglang.weight_sync.layout import layout_of
from sgpo_async.engines.sglang.weight_sync.model_facts import ModelFacts, model_facts
from sgpo_async.errors import CheckFailed, CheckWarning, DataError, SgpoError
from sgpo_async.installation import sglang_for_cpus
from sgpo_async.learner.process_group import device_for
from sgpo_async.local.watch import Watch
from sgpo_async.model.folder import load_tokenizer, model_folder, tokenizer_fingerprint
from sgpo_async.model.load import device_of, end_token_warning
from sgpo_async.tasks.benchmarks import open_benchmarks
from sgpo_async.tasks.self_check import check_reward
from sgpo_async.tasks.sources import source_of
from sgpo_async.weights import digest
from sgpo_async.weights.store_file import available_memory

Check = Callable[[Run, ModelFacts], str]

HUB_S = 3.0  # how long a hub may take to answer
SHARED_BYTES = 2**30  # what collectives of several ranks may need in /dev/shm
SHARED = Path("/dev/shm")
VERSION = "import importlib.metadata as m; print(m.version('sglang'))"
VERSION_S = 30.0


def examine_machine(run: Run) -> tuple[list[Finding], ModelFacts | None]:
    """One finding for each check, and the facts of the model, which most checks need."""
    try:
        facts = model_facts(
            model_folder(run.model.path),
            dtype=run.model.dtype,
            tp=run.engine.sglang.tp,
            device=device_of(run.engine.device),
            digest=digest,
        )
    except SgpoError as error:
        return [finding_of("model", error, remedy="set model.path to a model's folder")], None
    findings: list[Finding] = []
    for name, check in MACHINE.items():
        if any(one.check == NEEDED.get(name) and one.outcome == "failed" for one in findings):
            findings.append(Finding(name, "not run", f"correct {NEEDED[name]} first"))
            continue
        try:
            findings.append(Finding(name, "ok", check(run, facts)))
        except SgpoError as error:
            findings.append(finding_of(name, error, remedy=REMEDIES[name]))
    return findings, facts


def model(run: Run, facts: ModelFacts) -> str:
    """Describe the model; check that its weights can be verified on a server."""
    architecture = ", ".join(facts.config.get("architectures") or ["a model"])
    if run.engine.kind == "sglang":
        layout_of(facts.config, tp=run.engine.sglang.tp, device=facts.device)
    return f"{architecture}, {parameters(facts) / 1e6:.3g} M parameters, {facts.longest} positions, {run.model.dtype}"


def tokenizer(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """The model must have every token id that a prompt can contain: an unknown id kills a server."""
    loaded = load_tokenizer(facts.folder)
    largest = max(loaded.get_vocab().values())
    if largest >= facts.vocabulary:
        raise CheckFailed(
            f"its largest id is {largest}, and the model has {facts.vocabulary} tokens",
            "use the tokenizer that came with the model, or resize the model's embeddings",
        )
    if warning := end_token_warning(facts.skeleton, loaded):
        raise CheckWarning(warning, "give tokenizer_config.json and generation_config.json the same end token")
    return f"{tokenizer_fingerprint(loaded)}, ids to {largest} of {facts.vocabulary} tokens"


def learning_rate(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """Check that the warm-up ends before the run."""
    return preflight.learning_rate(run)


def problems(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """Check that the problems of run and benchmarks can be read, and have what the objective needs."""
    benchmarks = [f"{one.name} {len(one.problems)}" for one in open_benchmarks(run.evaluation)]
    return ", ".join([preflight.problems(run, source_of(run)), *benchmarks])


def strategies(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """Look for answers in a sample of the strategies."""
    return preflight.strategies(run, source_of(run))


def prompts(run: Run, facts: ModelFacts) -> str:
    """Check that prompts can be built, and that completions fit after them."""
    return preflight.prompts(run, source_of(run), load_tokenizer(facts.folder), facts.longest)


def rewards(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """Check the user's reward or environment, or that a sample of the answers is right by its own verifier."""
    return check_reward(run, source_of(run).training_problems())


def training(run: Run, facts: ModelFacts) -> str:
    """Check that memory suffices for the ranks of the learner."""
    gpus = device_for(gpus=torch.cuda.device_count(), ranks=run.local.ranks) == "cuda"
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if gpus else None
    found = preflight.training_memory(run, parameters(facts), gpu_bytes=gpu_bytes)
    if gpu_bytes is None:
        return found
    config, ranks = facts.skeleton.config, run.local.ranks
    try:
        planned = learner_memory(run, config, ranks=ranks, on_gpus=True, prompt_tokens=Assumptions.prompt_tokens)
    except DataError as error:
        raise CheckWarning(f"{found}; {error}", "compare the memory of the first steps with that of the GPUs") from None
    needed = RESERVED + planned.total
    peak = f"{size(needed)} at the peak of a step with learner.row_tokens={run.learner.row_tokens}"
    if needed > gpu_bytes:
        raise CheckFailed(f"{peak}, and a GPU has {size(gpu_bytes)}", "see sgpo-async plan CONFIG")
    return f"{found}; {peak}"


def hub(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """Check that the hub's address is free on this machine, or that a hub answers there."""
    host, _, port = run.hub.address.removeprefix("tcp://").rpartition(":")
    try:
        family, kind, _, _, where = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
        return f"{run.hub.address} is free"
    except OSError as error:
        reason = error
    if _hub_answers(run):
        return f"a hub answers at {run.hub.address}"
    if reason.errno != errno.EADDRINUSE:
        found = f"hub.address: {run.hub.address} is not an address of this machine ({reason.strerror})"
        found += ", and no hub answers there"
        raise CheckFailed(found, "start the hub there, or correct the address")
    found, remedy = f"hub.address: another process listens at {run.hub.address}", "choose another port: hub.address=..."
    if run.hub.address == Hub().address:
        raise CheckWarning(f"{found} (`local` chooses a free port by itself)", remedy)
    raise CheckFailed(found, remedy)


def memory(run: Run, facts: ModelFacts) -> str:
    """Two copies of the weights are kept in memory, or on the disk of the run's folder (see `weights.store_file`)."""
    copies, available = 2 * published_bytes(run, facts.skeleton), available_memory()
    if 2 * copies <= available:
        what = "adapters" if run.learner.lora.rank else "weights"
        return f"2 versions of the {what}, {size(copies)}, of {size(available)}"
    folder = existing(run.folder)
    found = f"2 versions of the weights, {size(copies)}, are more than half of {size(available)} of memory"
    if copies > free(folder):
        raise CheckFailed(f"{found}, and {folder} has {size(free(folder))}", "use a machine with more memory")
    raise CheckWarning(f"{found}: they are kept in a file in {folder}", "expect slower updates, or free some memory")


def shared_memory(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """Check /dev/shm, which collectives of several GPU ranks use; containers often limit it to 64 MB."""
    room = free(SHARED) if SHARED.exists() else 0
    several = run.engine.sglang.tp > 1 or run.local.ranks > 1
    if device_of(run.engine.device) == "cuda" and several and room < SHARED_BYTES:
        found = f"/dev/shm has {size(room)}, and ranks on GPUs may need {size(SHARED_BYTES)}"
        raise CheckWarning(found, "start the container with --shm-size=1g or more")
    return f"/dev/shm has {size(room)}"


def disk(run: Run, facts: ModelFacts) -> str:
    """Check the disk for checkpoints, the policy and logs."""
    return resources.disk(run, parameters(facts))


def trackers(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """Check that the packages of the trackers are installed."""
    return resources.trackers(run)


def open_files(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """Check the limit of open files."""
    return resources.open_files(run.local.actors)


def devices(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """Check that there are as many GPUs as the servers of one actor need."""
    count = torch.cuda.device_count()
    if device_of(run.engine.device) == "cpu":
        return f"CPU, {len(os.sched_getaffinity(0))} cores"
    own = run.engine.sglang
    needed = own.servers * own.tp if run.engine.kind == "sglang" and not own.urls else 1
    if count < needed:
        fewer = "lower engine.sglang.servers or engine.sglang.tp, or " if needed > 1 else ""
        found = f"engine.device: GPUs: {count} visible, {needed} needed by an actor"
        raise CheckFailed(found, f"{fewer}set engine.device=cpu")
    return f"GPUs: {count} visible, {needed} needed by an actor"


def sglang_python(run: Run, facts: ModelFacts) -> str:  # noqa: ARG001
    """Check SGLang's environment, if servers are launched here."""
    own = run.engine.sglang
    if run.engine.kind != "sglang":
        return "not used: engine.kind=embedded"
    if own.urls:
        return "not used: servers are attached by URL"
    try:
        answer = subprocess.run(
            [own.python, "-c", VERSION], capture_output=True, text=True, timeout=VERSION_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CheckFailed(f"engine.sglang.python: {own.python} cannot be run ({error})", REMEDIES["sglang"]) from None
    if answer.returncode:
        raise CheckFailed(f"engine.sglang.python: {own.python} has no sglang", REMEDIES["sglang"])
    return f"sglang {answer.stdout.strip()} in {own.python}"


def weights_folder(run: Run, facts: ModelFacts) -> str:
    """With transport=disk, check that the folder is writable and has room for the versions that are in it at a time."""
    own = run.engine.sglang
    if run.engine.kind != "sglang" or own.used_transport != "disk":
        return "not used"
    nbytes = _weight_bytes(run, facts)
    root, reason = (Path(own.folder), "") if own.folder else default_root(nbytes)
    folder, needed = existing(root), ROOM * nbytes
    require_writable(folder, "engine.sglang.folder", "set it to a folder that actor and servers share")
    if free(folder) < needed:
        found = f"engine.sglang.folder: {folder} has {size(free(folder))}, {ROOM} versions need {size(needed)}"
        raise CheckFailed(found, "free some space, or set another engine.sglang.folder")
    return f"{folder}: {size(free(folder))} for {ROOM} versions of {size(nbytes)}" + (f" ({reason})" if reason else "")


MACHINE: Mapping[str, Check] = {
    "model": model,
    "tokenizer": tokenizer,
    "learning rate": learning_rate,
    "problems": problems,
    "strategies": strategies,
    "prompts": prompts,
    "rewards": rewards,
    "hub": hub,
    "memory": memory,
    "training": training,
    "shared memory": shared_memory,
    "disk": disk,
    "open files": open_files,
    "trackers": trackers,
    "devices": devices,
    "sglang": sglang_python,
    "weights folder": weights_folder,
}
NEEDED = dict.fromkeys(("strategies", "prompts", "rewards"), "problems")  # not checked where the other check has failed
REMEDIES = dict.fromkeys(MACHINE, "correct the configuration") | {
    "model": "use a supported architecture, or engine.kind=embedded",
    "tokenizer": "add the tokenizer's files to model.path",
    "problems": "correct the file, or tasks.path, tasks.held_out, evaluation.benchmarks",
    "rewards": "correct tasks.reward",
    "prompts": "correct tasks.prompt, or the file of the problems",
    "hub": "make keys with sgpo-async keys DIR, and set hub.keys=DIR",
    "sglang": f"name the Python of an environment with sglang ({sglang_for_cpus()})",
}


def parameters(facts: ModelFacts) -> int:
    """How many parameters the model has; tied parameters count once."""
    return sum(parameter.numel() for parameter in facts.skeleton.parameters())


def _weight_bytes(run: Run, facts: ModelFacts) -> int:
    return parameters(facts) * getattr(torch, run.model.dtype).itemsize


def _hub_answers(run: Run) -> bool:
    """Whether a hub answers a status request within HUB_S. Raises HubError if the keys cannot be read."""
    watch = Watch(Path(run.folder), keys=run.hub.keys, max_bytes=run.hub.max_message_mb << 20)
    deadline = time.monotonic() + HUB_S
    try:
        while not watch.status and time.monotonic() < deadline:
            watch.poll(run.hub.address)
            time.sleep(0.05)
        return bool(watch.status)
    finally:
        watch.close()
