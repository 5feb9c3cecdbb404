"""Reward functions of the user: in worker processes, with limits, and errors that name function, problem and value."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sgpo_async.config import Run, Tasks, load
from sgpo_async.errors import CheckWarning, ConfigError, DataError, SgpoError
from sgpo_async.tasks import rewards
from sgpo_async.tasks.base import Problem
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.reward_pool import RewardPool, Verdict
from sgpo_async.tasks.rewards import Sample, is_builtin, load_reward, to_text, weights_of
from sgpo_async.tasks.self_check import SelfCheck, check_reward
from sgpo_async.tasks.task_sampler import TaskSampler

DEADLINE_S = 120.0
FUNCTIONS = """
import numpy

def found(sample):
    return sample.answer in sample.completion

def level(sample):
    return 0.5 * sample.columns["level"]

def array(sample):
    return numpy.float32(0.25)

def negative(sample):
    return -3

def prints(sample):
    print("text on standard output")
    return 1

def raises(sample):
    return 1 / len(sample.columns)

def exits(sample):
    raise SystemExit("no licence")

def nothing(sample):
    pass

def text(sample):
    return "1"

def nan(sample):
    return float("nan")

def huge(sample):
    return 10**400

def complex_number(sample):
    return 1j

def several(sample):
    return [1.0]

def hangs(sample):
    while True:
        pass

def exhausts(sample):
    return len([bytes(2**20) for _ in range(2**14)])

def leaves_at_once(sample):
    import os
    os._exit(3)

def forks(sample):
    import os
    os.fork()
    return 0.5

def leaves_children(sample):
    import os, time
    if os.fork() == 0:
        time.sleep(3600)
    if sample.answer == "ends":
        os._exit(0)
    return 0.25

def writes_to_every_file(sample):
    import os, sys
    print("{}", flush=True)
    sys.__stdout__.write("text")
    os.write(1, b"text")
    return 1

def reads_its_input(sample):
    import subprocess, sys
    return len(subprocess.run(["cat"], capture_output=True).stdout + sys.stdin.buffer.read())

def writes_into_pipes(sample):
    import os, time
    for descriptor in range(3, 32):
        try:
            os.write(descriptor, sample.answer.encode())
        except OSError:
            pass
    time.sleep(0 if sample.answer.endswith("\\n") else 3600)
    return 1

value = 3
"""
SAMPLE = Sample(problem="What is 1 + 1?", answer="2", completion="It is 2.", columns={"level": 3})


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a module of reward functions."""
    (tmp_path / "own_rewards.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pool(own: Path) -> Iterator[RewardPool]:
    pool = RewardPool(workers=1, limit_s=2.0, memory_mb=512)
    yield pool
    pool.close()


def judged(pool: RewardPool, reward: str, sample: Sample = SAMPLE) -> Verdict:
    pool.submit("key", reward, sample)
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if verdicts := pool.poll(1.0):
            return verdicts[0]
    raise AssertionError("no verdict")


@pytest.mark.process
def test_functions_of_the_working_folder_give_any_finite_reward(pool: RewardPool) -> None:
    values = {"found": 1.0, "level": 1.5, "array": 0.25, "negative": -3.0, "prints": 1.0}
    for name, value in values.items():
        assert judged(pool, f"own_rewards:{name}") == Verdict(key="key", reward=value)
    mixed = to_text({"math": 1.0, "own_rewards:level": 0.5, "own_rewards:negative": 2.0})
    assert judged(pool, mixed).reward == 1.0 + 0.75 - 6.0


FAULTS = {
    "raises": r"reward own_rewards:raises: raised ZeroDivisionError: division by zero at .*own_rewards.py:\d+ for the "
    r"problem 'What is 1 \+ 1\?'",
    "exits": "reward own_rewards:exits: raised SystemExit: no licence at .* for the problem 'What is 1",
    "nothing": r"must return a finite number, got None for the problem 'What is 1 \+ 1\?'; correct the function",
    "text": "must return a finite number, got '1' for the problem",
    "nan": "must return a finite number, got nan for the problem",
    "huge": "must return a finite number, got 1000",
    "complex_number": "must return a finite number, got 1j",
    "several": r"must return a finite number, got \[1.0\]",
    "value": "own_rewards has no function value; define it, or correct the name",
    "nosuch": "own_rewards has no function nosuch",
}


@pytest.mark.process
def test_a_function_at_fault_is_an_error_of_one_line_and_not_a_wrong_completion(pool: RewardPool) -> None:
    for name, message in FAULTS.items():
        with pytest.raises(SgpoError, match=message) as caught:
            judged(pool, f"own_rewards:{name}", Sample(problem=SAMPLE.problem, answer="2", completion=""))
        assert "\n" not in str(caught.value)
    with pytest.raises(SgpoError, match=r"tasks.reward: nosuch:f: cannot import nosuch from .* \(ModuleNotFoundError"):
        judged(pool, "nosuch:f")


@pytest.mark.process
def test_a_completion_that_exceeds_the_limit_of_time_or_memory_has_reward_0(pool: RewardPool) -> None:
    for name in ("hangs", "exhausts"):
        assert judged(pool, f"own_rewards:{name}") == Verdict(key="key", reward=0.0, timed_out=True)
        assert judged(pool, "math") == Verdict(key="key", reward=1.0), "the next one is judged"


@pytest.mark.process
def test_a_function_that_ends_its_process_costs_one_completion_and_a_line(
    pool: RewardPool, caplog: pytest.LogCaptureFixture
) -> None:
    assert judged(pool, "own_rewards:leaves_at_once") == Verdict(key="key", reward=0.0, timed_out=True)
    assert judged(pool, "own_rewards:found") == Verdict(key="key", reward=1.0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "reward own_rewards:leaves_at_once: ended its process with status 3: reward 0"


@pytest.mark.process
def test_a_function_cannot_read_requests_and_what_is_no_verdict_costs_its_completion(
    pool: RewardPool, caplog: pytest.LogCaptureFixture
) -> None:
    assert judged(pool, "own_rewards:reads_its_input").reward == 0.0
    for line in ("half a line", "text\n", "[1]\n", "3\n", '{"reward": 1, "more": 2}\n'):
        verdict = judged(pool, "own_rewards:writes_into_pipes", Sample(answer=line, completion=""))
        assert (verdict.reward, verdict.timed_out) == (0.0, True)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "reward own_rewards:writes_into_pipes: its worker's answer is no verdict"
    ] * 4
    assert judged(pool, "own_rewards:found").reward == 1.0


@pytest.mark.process
def test_what_a_function_forks_or_writes_is_no_verdict_and_ends_with_its_worker(pool: RewardPool) -> None:
    for name, value in (("forks", 0.5), ("found", 1.0), ("writes_to_every_file", 1.0), ("leaves_children", 0.25)) * 2:
        assert judged(pool, f"own_rewards:{name}") == Verdict(key="key", reward=value)
    (worker,) = [one for one in psutil.Process().children() if "sgpo_async.tasks.reward_worker" in one.cmdline()]
    deadline = time.monotonic() + DEADLINE_S
    while len(children := [one for one in worker.children() if one.status() != psutil.STATUS_ZOMBIE]) != 2:
        assert time.monotonic() < deadline, f"two sleeping children expected, got {children}"
        time.sleep(0.02)  # those of `forks` end by themselves
    ends = Sample(problem="p", answer="ends", completion="")
    assert judged(pool, "own_rewards:leaves_children", ends) == Verdict(key="key", reward=0.0, timed_out=True)
    _, alive = psutil.wait_procs(children, DEADLINE_S)
    assert not alive
    assert judged(pool, "own_rewards:found") == Verdict(key="key", reward=1.0)


def test_an_entry_point_names_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(*, group: str, name: str = "") -> list[Any]:
        assert group == "sgpo_async.rewards"
        function = SimpleNamespace(name="length", value="package:f", load=lambda: lambda sample: len(sample.completion))
        broken = SimpleNamespace(name="broken", value="package:g", load=lambda: 1 / 0)
        return [point for point in (function, broken) if name in ("", point.name)]

    monkeypatch.setattr(rewards, "entry_points", entry_points)
    assert load_reward("length")(SAMPLE) == len("It is 2.")
    assert load_reward('{"length": 0.5, "math": 1}')(SAMPLE) == 5.0
    with pytest.raises(DataError, match=r"tasks.reward: broken: cannot load package:g \(ZeroDivisionError"):
        load_reward("broken")
    known = "chains, cues, math, math-tolerance, broken, length"
    with pytest.raises(DataError, match=f"tasks.reward: must be one of {known}, or MODULE:FUNCTION, got 'lenght'"):
        load_reward("lenght")


def test_the_text_form_of_a_reward() -> None:
    assert weights_of(to_text("math")) == {"math": 1.0}
    assert weights_of(to_text({"math": 1, "my:f": 0.1})) == {"math": 1, "my:f": 0.1}
    assert is_builtin("math") and is_builtin(to_text({"math": 1}))
    assert not is_builtin("my:f") and not is_builtin(to_text({"math": 1, "my:f": 1}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tasks.reward={}", "tasks.reward must be the name of a verifier, MODULE:FUNCTION, or a mapping"),
        ("tasks.reward=[math]", "tasks.reward must be the name of a verifier"),
        ("tasks.reward={math: x}", "tasks.reward must be the name of a verifier"),
        ("tasks.reward={math: .nan}", "tasks.reward must be the name of a verifier"),
        ("tasks.solved_at=0", "tasks.solved_at must be > 0 and finite"),
        ("tasks.solved_at=2", "tasks.solved_at must be <= 1 without tasks.reward"),
        ("tasks.reward_memory_mb=10", "tasks.reward_memory_mb must be 0 or >= 256, got 10"),
    ],
)
def test_the_rules_of_the_settings(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load("", [override])


def test_a_reward_is_read_from_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("tasks:\n  reward: {math: 1.0, 'my:length': 0.1}\n  solved_at: 1.0\n")
    assert load(path).tasks.reward == {"math": 1.0, "my:length": 0.1}
    assert load("", ["tasks.reward=my:length"]).tasks.reward == "my:length"


def test_benchmarks_keep_their_own_verifier_and_what_counts_as_correct() -> None:
    run = Run(tasks=Tasks(reward="my:f", solved_at=2.5))
    source = CuesSource(seed=0, held_out=1)
    source.verifier = "my:f"
    benchmark = Benchmark(name="b", problems=[Problem(id="1", problem="p", answer="1")], samples=1)
    sampler = TaskSampler(run, source, [benchmark])
    leases = [sampler.task(number).lease(attempt=0, min_version=0) for number in (0, -1, -2)]
    assert [(lease.verifier, lease.solved_at) for lease in leases] == [("my:f", 2.5), ("my:f", 2.5), ("math", 1.0)]


def problems(tmp_path: Path, *records: dict[str, Any], **tasks: Any) -> tuple[Run, list[Problem]]:
    run = Run(tasks=Tasks(source="file", path="x", held_out=1, reward_limit_s=2.0, reward_memory_mb=512, **tasks))
    made = [
        Problem(id=f"x:{number}", problem=record["problem"], answer=record["answer"], columns=json.dumps(record))
        for number, record in enumerate(records, start=1)
    ]
    return run, made


@pytest.mark.process
def test_a_reward_is_checked_before_a_run_starts(own: Path) -> None:
    records = [{"problem": f"{n} + 1", "answer": str(n + 1), "level": n} for n in range(6)]
    found = check_reward(*problems(own, *records, reward="own_rewards:level", solved_at=0.5))
    assert found == (
        "own_rewards:level: rewards from 0 to 1.5 for 4 responses or answers in a box; correct from 0.5 on"
    )
    for name, message in (("nan", "got nan"), ("hangs", "exceeded tasks.reward_limit_s=2"), ("nosuch", "no function")):
        with pytest.raises(SgpoError, match=message):
            check_reward(*problems(own, *records, reward=f"own_rewards:{name}"))
    with pytest.raises(SgpoError, match="tasks.reward: must be one of chains, cues, math"):
        check_reward(*problems(own, *records, reward="nosuch"))


@pytest.mark.process
def test_answers_that_do_not_verify_against_themselves_are_counted_and_named(tmp_path: Path) -> None:
    bad = ["\\boxed{}", "$$"]
    answers = ["1", "\\$36", *bad, "(1,2)", "x^2"]
    run, made = problems(tmp_path, *[{"problem": f"p{i}", "answer": answer} for i, answer in enumerate(answers)])
    found = SelfCheck.run(made, sample=100, tasks=run.tasks)
    assert [problem.answer for problem in found.failed] == bad and found.examined == found.total == len(answers)
    assert found.describe().startswith(
        "2 of 6 answers are not correct by their own verifier: x:3 '\\\\boxed{}', x:4 '$$'"
    )
    with pytest.raises(CheckWarning, match="2 of 6 answers are not correct"):
        check_reward(run, made)
    assert check_reward(run, made[:2]) == "2 answers: each is correct by its own verifier"
    few = SelfCheck.run(made, sample=2, tasks=run.tasks)
    assert (few.examined, few.total) == (2, 6) and "(a sample of 6)" in few.describe()
