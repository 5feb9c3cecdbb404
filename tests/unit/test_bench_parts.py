"""The pure parts of `sgpo-async bench engine`, `pack`, `loss` and `trl`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sgpo_async.bench import engine, loss, pack, trl
from sgpo_async.bench.figures import as_json, columns, ratio, verdict, versions_elsewhere
from sgpo_async.bench.pack import Batch, divided, packed, padded, whole_groups, work
from sgpo_async.bench.served import Request
from sgpo_async.cli import bench as command
from sgpo_async.cli import main as cli
from sgpo_async.cli.main import main
from sgpo_async.errors import ConfigError, SgpoError
from sgpo_async.model.folder import model_folder
from sgpo_async.simulation import Lengths

KNOWN: dict[str, Any] = {"machine": "", "versions": {}, "load": [0.0, 0.0]}


def test_a_report_has_six_significant_digits_and_lists_of_numbers_in_one_line() -> None:
    report = {
        "rows": [{"name": "a [1,\n 2] b", "turns": (1 / 3, -2.5e-9 / 3, 12345678), "none": [], "mixed": [1, None, "x"]}]
    }
    text = as_json(report)
    expected = {
        "name": "a [1,\n 2] b",
        "turns": [0.333333, -8.33333e-10, 12345678],
        "none": [],
        "mixed": [1, None, "x"],
    }
    assert json.loads(text) == {"rows": [expected]}
    assert '"turns": [0.333333, -8.33333e-10, 12345678],\n' in text and len(text.splitlines()) == 14


def test_a_ratio_is_computed_within_each_turn_and_compared_with_its_bar() -> None:
    found = ratio("a", "b", 2.0, ([2.0, 6.0, 9.0], [1.0, 2.0, 9.0]))
    assert (found["median"], found["low"], found["high"]) == (2.0, 1.0, 3.0)
    assert verdict(found) == "" and verdict(found, at_most=True) == ""
    assert verdict(found | {"bar": 2.5}) == "missed" and verdict(found | {"bar": 1.5}, at_most=True) == "missed"


def test_columns_are_as_wide_as_their_cells() -> None:
    assert columns([["", "b"], ["long", "1"], ["c", "1,000"]]) == ["          b", "long      1", "c     1,000"]


def test_an_environment_that_lacks_the_peer_is_refused() -> None:
    with pytest.raises(SgpoError, match="--trl x: it must have no-such-package; make trl"):
        versions_elsewhere(sys.executable, "no-such-package", given="--trl x", remedy="make trl")
    with pytest.raises(SgpoError, match="--trl /no/python: cannot be run"):
        versions_elsewhere("/no/python", "trl", given="--trl /no/python", remedy="make trl")


# engine


@pytest.mark.parametrize("kind", engine.LENGTHS)
def test_lengths_fit_the_model_and_have_the_mean(kind: str) -> None:
    sizes = engine.Sizes(slots=100, batches=10, mean=20)
    lengths = engine.lengths_of(kind, sizes, [[0] * 28] * 1000, 128)
    assert len(lengths) == 1000 and min(lengths) >= 1 and max(lengths) <= 100
    assert sum(lengths) / 1000 == pytest.approx(20, rel=0.1)
    assert (len(set(lengths)) == 1) == (kind == "equal")


def test_a_row_ends_at_its_own_length() -> None:
    import torch

    ends = engine.Ends([5, 7])
    assert ends(torch.zeros(2, 5), None).tolist() == [True, False]
    assert ends(torch.zeros(2, 7), None).tolist() == [True, True]


class Timed:
    """A way that takes so many CPU seconds for a token."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._used = seconds, 7.0

    def __call__(self, work: Sequence[Request]) -> int:
        tokens = sum(one.length for one in work)
        self._used += tokens * self._seconds
        return tokens

    def cpu_s(self) -> float:
        return self._used


@pytest.mark.parametrize("peers", [["generate"], ["generate", "sglang"]])
def test_each_way_is_timed_by_its_own_clock_and_compared_with_every_peer(peers: list[str]) -> None:
    seconds = {"embedded": 0.01, "generate": 0.02, "sglang": 0.005}
    ways = {name: Timed(seconds[name]) for name in ["embedded", *peers]}
    sizes = engine.Sizes(slots=4, batches=2, mean=6, turns=2)
    found = {"model": "cues"} | engine.measure_ways(ways, model_folder("builtin:cues"), sizes)
    assert found["tokens_per_s"]["equal"]["embedded"]["median"] == pytest.approx(100)
    for kind in engine.LENGTHS:
        assert {one["to"]: one["median"] for one in found["ratios"][kind]} == pytest.approx(
            {name: seconds[name] / seconds["embedded"] for name in peers}
        )
    lines = engine.table(KNOWN | {"models": [found]})
    assert sum("sglang" in line and "missed" in line for line in lines) == 2 * ("sglang" in peers)


# pack

BATCH = Batch([pack.PROMPT + length for length in (10, 10, 10, 400) * 256], pack.PROMPT + 400)


def test_padding_is_what_was_computed_in_vain() -> None:
    in_turn = padded(BATCH, 1, by_length=False)
    assert in_turn.wasted == pytest.approx(1 - (3 * 110 + 500) / (4 * 500))
    assert padded(BATCH, 1, by_length=True).wasted == 0
    assert in_turn.over_mean == 1  # one rank never waits
    assert in_turn.over_ideal == pytest.approx(4 * work(500) / (3 * work(110) + work(500)))


def test_a_rank_that_gets_all_long_sequences_is_waited_for() -> None:
    found = packed(BATCH, 4)  # in turn: the fourth rank gets them all
    assert found.wasted == 0
    assert found.over_mean == pytest.approx(4 * work(500) / (3 * work(110) + work(500)), rel=0.2)
    for even in (whole_groups(BATCH, 4), divided(BATCH, 4)):
        assert even.wasted == 0 and 1 <= even.over_mean == even.over_ideal < 1.05


def test_the_table_of_pack_has_every_way_and_says_what_is_missing() -> None:
    rows = pack.measure("short", Lengths(longest=64, median=20), ranks=2, steps=2)
    assert [row["way"] for row in rows] == list(pack.WAYS)
    lines = pack.table(KNOWN | {"steps": 2, "rows": rows, "missing": pack.NO_RUN})
    assert lines[-1] == pack.NO_RUN and sum("2 ranks" in line for line in lines) == len(pack.WAYS)


def test_a_run_without_recorded_lengths_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SgpoError, match="has no recorded completions"):
        pack.recorded(str(tmp_path))


# loss


def test_fused_is_compared_with_every_other_way() -> None:
    run = {way: {"cpu_s": cpu, "extra_gb": gb, "loss": 1.0} for way, cpu, gb in
           (("naive", 2.0, 4.0), ("fused", 1.0, 0.1), ("liger", 0.5, 0.2))}  # fmt: skip
    found = loss.figures_of([run, run])
    ratios = {(one["to"], one["figure"]): one["median"] for one in found["ratios"]}
    assert ratios == pytest.approx(
        {("naive", "cpu_s"): 0.5, ("naive", "extra_gb"): 0.025, ("liger", "cpu_s"): 2.0, ("liger", "extra_gb"): 0.5}
    )
    report = KNOWN | {"sizes": loss.QUICK, "repetitions": 2, "losses": {"x": found}, "missing": loss.NO_LIGER}
    text = "\n".join(loss.table(report))
    assert text.count("missed") == 1 and text.endswith(loss.NO_LIGER)


# trl


def test_trl_is_told_what_the_demo_does() -> None:
    run = trl.run_of("trl", steps=120, seed=3, out="OUT")
    settings = trl.trainer_settings(run, ["steps_per_generation=2", "loss_type=dapo"])
    assert settings == trl.trainer_settings(run) | {"steps_per_generation": 2, "loss_type": "dapo"}
    with pytest.raises(ConfigError, match="--trl-set must be key=value, got 'fast'"):
        trl.trainer_settings(run, ["fast"])
    batch = run.learner.problems_per_step * run.rollout.size
    assert settings["per_device_train_batch_size"] * trl.PROCESSES == batch
    assert batch % settings["num_generations"] == 0 and settings["num_generations"] == 12
    assert (settings["learning_rate"], settings["warmup_steps"], settings["lr_scheduler_type"]) == (8e-4, 10, "linear")
    assert (settings["max_completion_length"], settings["max_steps"], settings["seed"]) == (40, 120, 3)
    assert run.algorithm.objective == "grpo" and not run.learner.skip_uniform
    assert trl.run_of("sgpo", steps=120, seed=3, out="OUT").algorithm.objective == "sgpo"


def test_what_trl_measured_is_taken_between_whole_generations() -> None:
    run = trl.run_of("trl", steps=9, seed=0, out="OUT")
    ended = [4.0, 5.0, 6.0, 7.0, 11.0, 12.0, 13.0, 14.0, 18.0]  # a generation takes three seconds
    ranks = [
        {"ended_s": ended, "tokens": [10.0 * (i + 1) for i in range(9)], "generating_s": 9.0,
         "evaluations": [[0, 0.1], [9, 0.95]] if rank == 0 else []}
        for rank in range(2)
    ]  # fmt: skip
    found = trl.measured_trl(ranks, run, parts=4)
    assert found.tokens_per_s == pytest.approx(2 * 40 / 7) and found.problems_per_s == pytest.approx(16 * 4 / 7)
    assert found.pass_rates == [(0.0, 0.1), (18.0, 0.95)] and found.target_s == 18.0 and found.best == 0.95
    assert found.generating == 0.5


def test_the_table_of_trl_says_what_never_got_there() -> None:
    def runs(rate: float, last: float, generating: float | None = None) -> list[trl.Measured]:
        return [
            trl.Measured(
                tokens_per_s=rate, problems_per_s=rate, tokens_per_cpu_s=rate, generating=generating,
                pass_rates=[(0.0, 0.1), (9.0, last)],
            )
        ]  # fmt: skip

    report = trl.report_of({"sgpo": runs(3.0, 0.95), "grpo": runs(5.0, 0.2), "trl": runs(2.0, 0.3, 0.5)})
    lines = trl.table(report | KNOWN | {"steps": 9})
    (row,) = [line for line in lines if line.startswith("trl ")]
    assert "never" in row and "0 of 1" in row
    assert sum(line.endswith("missed") for line in lines) == 2  # those of sgpo
    assert lines[-1] == "TRL generates in 50% of its time."


def test_trl_needs_its_environment(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "trl", "--to", str(tmp_path)]) == 2
    assert "error: bench trl: needs --trl PYTHON" in capsys.readouterr().err


def test_every_part_is_a_function_of_its_module() -> None:
    import importlib

    for part in command.PARTS:
        assert callable(getattr(importlib.import_module(f"sgpo_async.bench.{part}"), f"run_bench_{part}"))


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        (["pack", "--trl", "python"], "bench pack must not be given --trl, which is an option of trl, got 'python'"),
        (["builtin:demo", "--peers", "p"], "must not be given --peers, which is an option of transport"),
        (["loss", "--trl-set", "a=1"], "must not be given --trl-set"),
    ],
)
def test_an_option_of_another_part_is_refused(
    command: list[str], refused: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *command]) == 2
    assert refused in capsys.readouterr().err
