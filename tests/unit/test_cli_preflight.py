"""What a run would find out late is found before it starts, in one line with a remedy."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgpo_async.cli import preflight as module
from sgpo_async.cli.main import main
from sgpo_async.cli.preflight import learning_rate, preflight, problems, prompts, training_memory
from sgpo_async.config import Run, load
from sgpo_async.errors import CheckFailed, DataError, SgpoError
from sgpo_async.model.folder import load_tokenizer, longest_sequence, model_folder, plain_tokenizer
from sgpo_async.model.load import load_model, longest
from sgpo_async.tasks.self_check import check_reward
from sgpo_async.tasks.sources import source_of

ROOT = Path(__file__).resolve().parents[2]
CUES = model_folder("builtin:cues")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def problem(number: int, **columns: str) -> dict[str, str]:
    digits = " ".join(str(number))  # each is a word that the shipped policy knows
    return {"problem": f"3 + {digits}", "answer": str(3 + number)} | columns


def settings(folder: Path, rows: list[dict[str, str]], *words: str) -> Run:
    file = folder / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["tasks.source=file", f"tasks.path={file}", "tasks.held_out=2", f"out={folder}"]
    return load(ROOT / "configs/demo.yaml", [*own, *words])


def model(folder: Path, template: str = TEMPLATE, **config: object) -> Path:
    """A copy of the shipped policy with a chat template and some other values in its config.json."""
    shutil.copytree(CUES, folder)
    (folder / "chat_template.jinja").write_text(template)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


GUIDED = [problem(number, strategy="add") for number in range(12)]


# ---- problems


def test_problems_are_counted(tmp_path: Path) -> None:
    run = settings(tmp_path, [problem(n, strategy="add") for n in range(9)] + [problem(9, response="12")])
    source = source_of(run)
    training = [source.training(position) for position in range(8)]
    strategies, responses = (
        sum(getattr(one, name) is not None for one in training) for name in ("strategy", "response")
    )
    found = problems(run, source)
    assert found == (
        f"{run.tasks.path}: 8 problems, {strategies} with strategies, {responses} with responses, 2 held out"
    )


def test_sgpo_without_any_strategy_is_refused(tmp_path: Path) -> None:
    """It would train as GRPO, with alpha 0; GRPO itself needs none."""
    rows = [problem(number) for number in range(6)]
    with pytest.raises(DataError, match="sgpo needs strategies, but no training problem has one; make"):
        preflight(settings(tmp_path, rows))
    assert preflight(settings(tmp_path, rows, "algorithm.objective=grpo")) == []


@pytest.mark.parametrize("few", [1, 3])
def test_few_strategies_are_said(tmp_path: Path, few: int) -> None:
    rows = [problem(n, **({"strategy": "add"} if n < few + 2 else {})) for n in range(12)]
    run = settings(tmp_path, rows)
    training = [source_of(run).training(position) for position in range(10)]
    count = sum(one.strategy is not None for one in training)
    (note,) = preflight(run)
    assert f"10 problems, {count} with strategies" in note and "train without distillation" in note
    assert preflight(settings(tmp_path, rows, "algorithm.objective=grpo")) == []


# ---- learning rate


@pytest.mark.parametrize(("steps", "told"), [(9, True), (10, False)])
def test_a_run_that_ends_before_its_warm_up_is_said(tmp_path: Path, steps: int, told: bool) -> None:
    run = settings(tmp_path, GUIDED, f"steps={steps}", "optim.warmup_steps=10", "optim.lr=3e-4")
    notes = [note for note in preflight(run, light=True) if "warmup" in note]
    text = "optim.warmup_steps is 10, and the run has 9 steps: the learning rate does not reach optim.lr=0.0003"
    assert notes == [f"{text}; lower optim.warmup_steps"] * told
    if not told:
        assert learning_rate(run) == "0.0003 after 10 of 10 steps"


# ---- strategies


@pytest.mark.parametrize(
    ("leaky", "words", "told"),
    [(2, [], False), (12, [], True), (12, ["tasks.context=answer"], False), (12, ["algorithm.objective=grpo"], False)],
)
def test_strategies_that_contain_the_answer_are_said(tmp_path: Path, leaky: int, words: list[str], told: bool) -> None:
    rows = [problem(n + 40, strategy=f"it is {43 + n}" if n < leaky else "add the two") for n in range(22)]
    run = settings(tmp_path, rows, *words)
    count = sum("it is" in str(one.strategy) for one in source_of(run).training_problems())
    notes = [note for note in preflight(run) if note.startswith("strategies: ")]
    assert len(notes) == told
    for note in notes:
        assert f"{count} of 20 contain the answer" in note and "problems.jsonl:" in note
        assert f"`sgpo-async strategies check {run.tasks.path}`" in note


# ---- prompts


@pytest.mark.parametrize("long", ["problem", "strategy"])
def test_a_prompt_after_which_no_completion_fits_is_refused(tmp_path: Path, long: str) -> None:
    """One among many, which no sample would find; the longer of the two prompts counts."""
    rows = [problem(number, strategy="add") for number in range(2000)]
    rows[1234] |= {long: "7 " * 100}
    run = settings(tmp_path, rows, "tasks.held_out=1")
    fits = int(str(refusal(run)).partition("rollout.max_new_tokens <= ")[2].partition(",")[0])
    assert "problems.jsonl:1235" in str(refusal(run)) and "1 of " in str(refusal(run))
    changed = settings(tmp_path, rows, "tasks.held_out=1", f"rollout.max_new_tokens={fits}")
    assert preflight(changed) == []
    refusal(settings(tmp_path, rows, "tasks.held_out=1", f"rollout.max_new_tokens={fits + 1}"))


def refusal(run: Run) -> CheckFailed:
    with pytest.raises(CheckFailed, match="exceed the model's 128 positions") as failure:
        preflight(run)
    return failure.value


def test_more_new_tokens_than_positions_are_refused() -> None:
    failure = refusal(load(ROOT / "configs/demo.yaml", ["rollout.max_new_tokens=4096"]))
    assert "4096 new tokens after " in str(failure) and "set rollout.max_new_tokens <= " in str(failure)


def test_a_prompt_longer_than_the_model_has_no_limit_to_set(tmp_path: Path) -> None:
    failure = refusal(settings(tmp_path, [*GUIDED, problem(1, problem="5 " * 200)]))
    assert failure.remedy == "shorten or remove these problems"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("", "has no chat template"),
        ("{% for m in messages %}{{ m['content'] }}", "TemplateSyntaxError"),
        ("{{ raise_exception('no user message allowed') }}", "no user message allowed"),
        ("{{ messages[7]['content'] }}", "UndefinedError"),
    ],
)
def test_a_chat_template_that_is_missing_or_fails_is_refused(tmp_path: Path, template: str, reason: str) -> None:
    folder = model(tmp_path / "model", template)
    if not template:
        (folder / "chat_template.jinja").unlink()
    run = settings(tmp_path, GUIDED, f"model.path={folder}", "tasks.prompt=chat", "rollout.max_new_tokens=8")
    with pytest.raises((CheckFailed, DataError), match=reason) as failure:
        preflight(run)
    assert "\n" not in str(failure.value) and "tasks.prompt" in str(failure.value)
    assert preflight(run, light=True) == [], "the hub loads no such tokenizer"


def test_a_chat_template_that_works_passes(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    words = (f"model.path={folder}", "tasks.prompt=chat", "rollout.max_new_tokens=1")
    run = settings(tmp_path, GUIDED, *words)
    found = prompts(run, source_of(run), load_tokenizer(str(folder)), longest_sequence(str(folder)))
    assert found.startswith("chat: ") and found.endswith("of 128 positions")


def test_the_light_tokenizer_gives_the_same_tokens() -> None:
    light, whole = plain_tokenizer(CUES), load_tokenizer(CUES)
    assert light is not None
    for one in source_of(load(ROOT / "configs/demo.yaml")).training_problems():
        text = f"{one.strategy}\n{one.problem}"
        assert light.encode(text, add_special_tokens=False) == whole.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_position_embeddings": 64},
        {"sliding_window": 32, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3},
        {"sliding_window": 32, "use_sliding_window": False},
    ],
)
def test_the_positions_of_a_model_are_those_that_its_engine_has(tmp_path: Path, config: dict[str, object]) -> None:
    folder = str(model(tmp_path / "model", **config))
    assert longest_sequence(folder) == longest(load_model(folder, device="cpu", dtype="float32"))


def test_a_configuration_without_positions_is_no_reason_to_refuse(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert longest_sequence(str(tmp_path)) is None and longest_sequence("owner/on-the-hub") is None
    run = settings(tmp_path, GUIDED)
    assert "no number of positions" in prompts(run, source_of(run), plain_tokenizer(CUES), None)


def test_different_problems_with_the_same_prompt_are_said(tmp_path: Path) -> None:
    """The shipped policy knows the words of its own domain only."""
    rows = [{"problem": f"Which animal is {name} like?", "answer": name} for name in ("Tom", "Eva", "Ali", "Kim")]
    (note,) = preflight(settings(tmp_path, rows, "algorithm.objective=grpo"))
    assert note.startswith(
        "4 problems have only 1 different prompts: model.path=builtin:cues does not know their words"
    )


# ---- rewards and memory


@pytest.mark.process
@pytest.mark.parametrize("key", ["reward", "environment"])
def test_code_of_the_user_is_tried_before_anything_starts(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_code.py").write_text("def broken(sample):\n    raise KeyError('level')\n\nclass Broken:\n    pass\n")
    name = {"reward": "own_code:broken", "environment": "own_code:Broken"}[key]
    with pytest.raises(SgpoError, match=f"{key} {name}: .*(KeyError: 'level'|AttributeError)") as failure:
        preflight(settings(tmp_path, GUIDED, f"tasks.{key}={name}"), light=True)
    assert "\n" not in str(failure.value)


@pytest.mark.process
def test_an_environment_that_works_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    run = settings(tmp_path, GUIDED, "tasks.environment=own_environment:Guess")
    assert check_reward(run, source_of(run).training_problems()).startswith("own_environment:Guess: of 4 episodes ")
    assert preflight(run) == []


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The free memory, in a list so that a test can change it; no GPU."""
    free = [0]
    monkeypatch.setattr(module, "available_memory", lambda: free[0])
    monkeypatch.setattr(module, "GPU", Path("/nowhere"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    yield free


@pytest.mark.parametrize(("teacher", "each"), [("self", 16), ("frozen", 20), ("behaviour", 16)])
def test_memory_for_weights_gradients_optimiser_and_teacher(memory: list[int], teacher: str, each: int) -> None:
    keys = [f"algorithm.teacher={teacher}", "algorithm.teacher_temperature=1"]
    run = load(ROOT / "configs/demo.yaml", ["local.ranks=2", *keys])
    memory[0] = each * 10**6
    assert f"{each / 2:g} MB in each of 2 ranks" in training_memory(run, 10**6, gpu_bytes=None)
    memory[0] -= 1
    with pytest.raises(CheckFailed, match="2 ranks need .* of memory here, .*; use more ranks or a"):
        training_memory(run, 10**6, gpu_bytes=None)


def test_memory_of_gpus(memory: list[int]) -> None:
    """The memory of the machine is not needed: each rank reads its part of the model to its GPU."""
    run = load(ROOT / "configs/demo.yaml", ["local.ranks=4", "algorithm.teacher=self"])
    memory[0] = 0
    assert training_memory(run, 10**6, gpu_bytes=4 * 10**6)
    with pytest.raises(CheckFailed, match="a GPU has 4 MB"):
        training_memory(run, 10**6, gpu_bytes=4 * 10**6 - 1)


@pytest.mark.parametrize(("state", "each"), [("bfloat16", 12), ("int8", 10)])
def test_memory_if_moments_take_fewer_bytes(memory: list[int], state: str, each: int) -> None:
    words = ["local.ranks=1", "algorithm.teacher=self", f"optim.state={state}"]
    memory[0] = 10**9
    assert training_memory(load(ROOT / "configs/demo.yaml", words), 10**6, gpu_bytes=None).startswith(f"{each} MB in")


def test_weights_in_host_memory_need_no_memory_of_gpus(memory: list[int]) -> None:
    run = load(ROOT / "configs/demo.yaml", ["local.ranks=4", "algorithm.teacher=self", "learner.offload_weights=true"])
    memory[0] = 16 * 10**6
    assert training_memory(run, 10**6, gpu_bytes=1).startswith("4 MB in each of 4 ranks")
    memory[0] -= 1
    with pytest.raises(CheckFailed, match="4 ranks need 16 MB of memory here"):
        training_memory(run, 10**6, gpu_bytes=10**9)


@pytest.mark.parametrize(("words", "each"), [([], 8), (["learner.shard_over=world"], 4)])
def test_memory_if_every_node_has_its_own_shards(
    memory: list[int], words: list[str], each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    run = load(ROOT / "configs/demo.yaml", ["algorithm.teacher=self", *words])
    memory[0] = 2 * each * 10**6
    assert training_memory(run, 10**6, gpu_bytes=None).startswith(f"{each} MB in each of 4 ranks")
    memory[0] -= 1
    with pytest.raises(CheckFailed, match=f"2 ranks need {2 * each} MB"):
        training_memory(run, 10**6, gpu_bytes=None)


# ---- the commands


def test_the_demo_is_checked_without_torch() -> None:
    """Its import would take longer than everything else at the start."""
    code = (
        "import sys; from sgpo_async.cli.preflight import preflight; from sgpo_async.config import load; "
        "assert preflight(load(sys.argv[1])) == []; print({'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(ROOT / "configs/demo.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "set()\n"


@pytest.mark.parametrize("command", ["local", "hub", "learner"])
def test_a_command_refuses_before_it_writes_anything(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    words = [str(ROOT / "configs/demo.yaml"), f"out={tmp_path}", "rollout.max_new_tokens=4096"]
    assert main([command, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: rollout.max_new_tokens: 4096 new tokens after ")
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_finds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(ROOT / "configs/demo.yaml"), f"out={tmp_path}", "hub.address=tcp://127.0.0.1:0"]
    assert main(["doctor", *words, "tasks.prompt=chat", "rollout.max_new_tokens=4096"]) == 2
    found = " ".join(capsys.readouterr().out.split())
    assert "has no chat template" in found and "failed: prompts: " in found
    assert "problems, 256 with strategies" in found and "1 failed" in found
