"""Results per problem of an evaluation round: the learner receives them, and checkpoints do not contain them."""

from __future__ import annotations

import itertools

from hub_support import Driver, Source, train_one_step

from sgpo_async.hub.evaluation import without_problem_results
from sgpo_async.hub.snapshot import dump, load
from sgpo_async.tasks.benchmarks import Benchmark
from sgpo_async.wire import records as wire


def test_a_state_does_not_contain_the_problem_results_of_delivered_rounds():
    """The state keeps the metrics of each round, whose size does not depend on a benchmark's number of problems."""

    def growth(problems: int) -> list[int]:
        source = Source(held_out=1)
        benchmark = Benchmark(name="wide", problems=[source.training(i) for i in range(problems)], samples=1)
        driver = Driver(source=source, benchmarks=[benchmark])
        driver.learner()
        driver.actor(b"a", credit=1)
        sizes = []
        for step in range(5):
            driver.serve_evaluation(b"a")
            (score,) = driver.only(b"r0", wire.Evaluated).benchmarks
            assert len(score.results) == problems
            sizes.append(len(dump(driver.core.training, driver.core.evaluation)))
            train_one_step(driver, step=step)
            driver.send(b"r0", wire.Evaluate(version=step + 1))
            driver.send(b"a", wire.Ready(tasks=1, version=step + 1))
        return [after - before for before, after in itertools.pairwise(sizes)]

    few, many = growth(2), growth(40)
    assert max(many) < max(few) + 40


def test_problem_results_in_the_state_of_an_older_release_are_dropped():
    driver = Driver()
    score = wire.BenchmarkScore(name="old", avg=1, low=1, high=1, samples=1, problems=1, results={"id": {}})
    metrics = {"pass_auto": 1, "pass_guided": 1, "problems": 2, "served_oldest": 0, "served_newest": 0, "lag": 0}
    old = wire.Evaluated(version=0, **metrics, benchmarks=(score,))
    driver.core.evaluation.results.append(old)
    state = dump(driver.core.training, driver.core.evaluation)
    _, evaluation = load(state, training=driver.core.training, evaluation=driver.core.evaluation)
    assert evaluation.results == [without_problem_results(old)]


def test_a_round_that_ends_without_a_learner_keeps_its_problem_results_for_the_next_learner():
    source = Source(held_out=1)
    hard = Benchmark(name="hard", problems=[source.training(7)], samples=1)
    driver = Driver(source=source, benchmarks=[hard])
    driver.learner()
    driver.send(b"r0", wire.Goodbye())
    driver.actor(b"a", credit=2)
    driver.serve_evaluation(b"a")
    assert not driver.take(b"r0", wire.Evaluated)
    driver.learner(publish=False)
    driver.send(b"r0", wire.Evaluate(version=0))
    assert driver.only(b"r0", wire.Evaluated).benchmarks[0].results.keys() == {"training 7"}
    driver.send(b"r0", wire.Evaluate(version=0))  # the answer was lost
    assert driver.only(b"r0", wire.Evaluated).benchmarks[0].results.keys() == {"training 7"}
    assert not driver.core.evaluation.lean_results()[0].benchmarks[0].results, "a checkpoint does not need them"
