"""Rewards: the verdicts of math-verify, and a pool that survives hanging and killed workers."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from sgpo_async.errors import SgpoError
from sgpo_async.tasks import reward_pool
from sgpo_async.tasks.cues import CuesSource
from sgpo_async.tasks.reward_pool import ANSWERS, TIMEOUTS, RewardPool, TimeoutStreak, Verdict
from sgpo_async.tasks.rewards import Sample
from sgpo_async.tasks.verify import VERIFIERS

HANGS = "\\boxed{(10^{10^{10}})! + 1}"
DEADLINE_S = 120.0


def collect(pool: RewardPool, count: int) -> dict[object, Verdict]:
    verdicts: dict[object, Verdict] = {}
    deadline = time.monotonic() + DEADLINE_S
    while len(verdicts) < count and time.monotonic() < deadline:
        verdicts.update({verdict.key: verdict for verdict in pool.poll(timeout_s=1.0)})
    return verdicts


def workers_of(pid: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(pid).children() if "sgpo_async.tasks.reward_worker" in p.cmdline()]


@pytest.fixture
def pool() -> Iterator[RewardPool]:
    pool = RewardPool(workers=1, limit_s=2.0)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("answer", "completion", "correct"),
    [
        ("1/2", "so it is \\boxed{0.5}", True),
        ("\\frac{1}{2}", "\\boxed{\\frac12}", True),
        ("$42$", "The answer is 42.", True),
        ("x^2+1", "\\boxed{1 + x^2}", True),
        ("1,234", "\\boxed{1234}", True),
        ("42", "\\boxed{43}", False),
        ("42", "", False),
        ("B", "\\boxed{C}", False),
    ],
)
def test_a_math_answer_is_correct_in_any_equivalent_form(answer: str, completion: str, correct: bool) -> None:
    assert VERIFIERS["math"](answer, completion) is correct


def test_cues_are_verified_immediately_without_a_worker_process(pool: RewardPool) -> None:
    problem = CuesSource(seed=0, held_out=0).training(0)
    pool.submit(("group", 1), "cues", Sample(answer=problem.answer, completion=problem.response or ""))
    pool.submit(("group", 2), "cues", Sample(answer=problem.answer, completion="no"))
    assert pool.poll() == [Verdict(key=("group", 1), reward=1.0), Verdict(key=("group", 2), reward=0.0)]
    assert pool.poll() == []
    assert workers_of(os.getpid()) == []


@pytest.mark.process
def test_a_hanging_completion_is_incorrect_and_the_next_is_verified(pool: RewardPool) -> None:
    pool.submit("right", "math", Sample(answer="2", completion="\\boxed{2}"))
    pool.submit("hangs", "math", Sample(answer="7", completion=HANGS))
    pool.submit("wrong", "math", Sample(answer="2", completion="\\boxed{3}"))
    pool.submit("right again", "math", Sample(answer="2", completion="\\boxed{\\frac{4}{2}}\nwith a line break"))
    verdicts = collect(pool, 4)
    assert {key: (v.reward, v.timed_out) for key, v in verdicts.items()} == {
        "right": (1.0, False),
        "hangs": (0.0, True),
        "wrong": (0.0, False),
        "right again": (1.0, False),
    }
    assert pool.timeouts == 1


@pytest.mark.process
def test_a_worker_killed_from_outside_is_replaced(pool: RewardPool) -> None:
    pool.submit("first", "math", Sample(answer="2", completion="\\boxed{2}"))
    assert collect(pool, 1)["first"].reward == 1.0
    [worker] = workers_of(os.getpid())
    worker.kill()
    pool.submit("lost", "math", Sample(answer="2", completion="\\boxed{2}"))
    pool.submit("next", "math", Sample(answer="2", completion="\\boxed{2}"))
    verdicts = collect(pool, 2)
    assert (verdicts["lost"].reward, verdicts["lost"].timed_out) == (0.0, True)
    assert verdicts["next"].reward == 1.0


@pytest.mark.slow
@pytest.mark.process
def test_a_worker_that_its_alarm_cannot_kill_is_replaced(pool: RewardPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process, as one whose verifier has taken the alarm away."""
    monkeypatch.setattr(reward_pool, "GRACE_S", 0.5)
    pool.submit("first", "math", Sample(answer="2", completion="\\boxed{2}"))
    assert collect(pool, 1)["first"].reward == 1.0
    [worker] = workers_of(os.getpid())
    worker.suspend()
    pool.submit("stuck", "math", Sample(answer="2", completion="\\boxed{2}"))
    pool.submit("next", "math", Sample(answer="2", completion="\\boxed{2}"))
    verdicts = collect(pool, 2)
    assert (verdicts["stuck"].reward, verdicts["stuck"].timed_out) == (0.0, True)
    assert verdicts["next"].reward == 1.0 and not worker.is_running()


def streak(*verdicts: tuple[str, str, bool]) -> TimeoutStreak:
    made = TimeoutStreak()
    for verifier, answer, timed_out in verdicts:
        made.record(verifier, answer, timed_out=timed_out)
    return made


def test_a_verifier_is_hopeless_after_timeouts_in_every_worker_for_several_answers() -> None:
    timeouts = [("math", str(number % ANSWERS), True) for number in range(2 * TIMEOUTS)]
    assert streak(*timeouts).is_hopeless(workers=2)
    assert not streak(*timeouts[1:]).is_hopeless(workers=2)
    assert not streak(*timeouts).is_hopeless(workers=3)
    assert not streak(*timeouts, ("math", "1", False)).is_hopeless(workers=2)
    assert not streak(*timeouts, ("math-tolerance", "1", True)).is_hopeless(workers=2)


def test_one_problem_whose_answer_hangs_does_not_make_a_verifier_hopeless() -> None:
    assert not streak(*[("math", "(10^{10^{10}})!", True)] * 1000).is_hopeless(workers=2)


@pytest.mark.process
def test_a_reward_that_never_returns_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_pool, "TIMEOUTS", ANSWERS)
    pool = RewardPool(workers=1, limit_s=0.2)
    for number in range(ANSWERS):
        pool.submit(number, "math", Sample(answer=str(number), completion=HANGS))
    expected = (
        rf"reward math: none of the last {ANSWERS} completions was judged within tasks.reward_limit_s=0.2 by 1 workers "
        r"\(tasks.reward_workers, tasks.reward_memory_mb=0\); correct the verifier"
    )
    try:
        with pytest.raises(SgpoError, match=expected):
            collect(pool, ANSWERS)
    finally:
        pool.close()


@pytest.mark.process
def test_a_worker_that_cannot_start_raises_an_error_and_gives_no_verdict(
    pool: RewardPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    pool.submit("key", "math", Sample(answer="2", completion="\\boxed{2}"))
    with pytest.raises(SgpoError, match="reward worker: exit status"):
        pool.poll(timeout_s=DEADLINE_S)


@pytest.mark.process
def test_close_ends_busy_workers() -> None:
    pool = RewardPool(workers=2, limit_s=300.0)
    for key in range(4):
        pool.submit(key, "math", Sample(answer="7", completion=HANGS if key else "7"))
    collect(pool, 1)
    workers = workers_of(os.getpid())
    assert workers
    pool.close()
    _, alive = psutil.wait_procs(workers, timeout=DEADLINE_S)
    assert alive == []


@pytest.mark.process
def test_a_worker_that_survives_its_kill_hides_no_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(timeout: float) -> None:
        raise subprocess.TimeoutExpired("worker", timeout)

    pool = RewardPool(workers=1, limit_s=300.0)
    pool.submit("key", "math", Sample(answer="7", completion="7"))
    collect(pool, 1)
    (worker,) = pool._processes.values()
    with monkeypatch.context() as patched:
        patched.setattr(worker, "wait", wait)
        pool.close()
    worker.wait()


@pytest.mark.process
def test_workers_end_when_their_parent_is_killed() -> None:
    script = (
        "from sgpo_async.tasks.reward_pool import RewardPool\n"
        "from sgpo_async.tasks.rewards import Sample\n"
        "pool = RewardPool(workers=2, limit_s=2.0)\n"
        f"for key in range(4): pool.submit(key, 'math', Sample(answer='7', completion='7' if key < 2 else {HANGS!r}))\n"
        "print(len(pool.poll(timeout_s=100.0)), flush=True)\n"
        "import time; time.sleep(300)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline()
    workers = workers_of(parent.pid)
    assert workers
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(timeout=DEADLINE_S)
    parent.stdout.close()
    _, alive = psutil.wait_procs(workers, timeout=DEADLINE_S)
    assert alive == []
