"""From results to curves and README.md, without a process."""

import math
from pathlib import Path
from typing import Any

import pytest
from experiment_support import SMALL, result, write

from sgpo_async.config import load
from sgpo_async.config.experiment import load_experiment
from sgpo_async.config.schema import Run
from sgpo_async.errors import ConfigError
from sgpo_async.experiments.curves import completed, late, over_seeds, third
from sgpo_async.experiments.plan import final, trial
from sgpo_async.experiments.statistics import interval
from sgpo_async.experiments.tables import write_tables

RUN: Run = load("", ["steps=6", "evaluation.every=2", "local.ranks=1"])


def test_the_pass_rate_at_a_third_of_the_run_is_interpolated() -> None:
    assert third(result(0.0, 0.3, 0.6, 0.9)) == pytest.approx(0.3)
    assert third(result(0.0, 0.4, 0.8)) == pytest.approx(0.4 * 2 / 3)


def test_the_interval_is_that_of_student_s_t() -> None:
    # Worked by hand: mean 3, standard deviation sqrt(2.5), t(4) = 2.776.
    assert interval([1, 2, 3, 4, 5]) == (3, pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5)), 5)
    assert interval([0.5]) == (0.5, None, 1)
    values = [0.0, 1.0] * 10  # t(19) = 2.093
    assert interval(values).half == pytest.approx(2.093 * math.sqrt(5 / 19) / math.sqrt(20))


def test_a_diverged_run_counts_0_from_then_on_and_changes_no_other_run() -> None:
    runs = [completed(one, RUN) for one in (result(0.0, 0.3, 0.6, 0.9), result(0.3, 0.6, diverged=3))]
    assert [point["step"] for point in runs[1]["curve"]] == [0, 2, 4, 6]
    assert [(at, found.mean, found.n) for at, found in over_seeds(runs, "auto")] == [
        (0, pytest.approx(0.15), 2),
        (384, pytest.approx(0.45), 2),
        (768, pytest.approx(0.3), 2),
        (1152, pytest.approx(0.45), 2),
    ]
    assert runs[0] == result(0.0, 0.3, 0.6, 0.9)


@pytest.mark.parametrize(("diverged", "expected"), [(0, 0.0), (1, 0.0), (2, 0.6), (5, 0.6)])
def test_a_run_that_diverged_before_a_third_of_its_steps_has_pass_rate_0_there(diverged: int, expected: float) -> None:
    measured = [0.4, 0.6, 0.8][: diverged // 2 + 1]
    assert third(completed(result(*measured, diverged=diverged), RUN)) == expected


def test_a_metric_of_only_some_seeds_is_averaged_over_those() -> None:
    runs = [completed(one, RUN) for one in (result(0.1, 0.2, 0.3, 0.4, entropy=0.5), result(0.3, diverged=1))]
    assert over_seeds(runs, "entropy") == [(at, (0.5, None, 1)) for at in (384, 768, 1152)]


def without_guided(one: dict[str, Any]) -> dict[str, Any]:
    """The result of a method whose context guides no rollouts, e.g. a sibling."""
    return one | {"curve": [point | {"guided": None} for point in one["curve"]], "test": one["test"] | {"guided": None}}


def test_a_guided_pass_rate_that_no_run_has_is_neither_averaged_nor_0() -> None:
    runs = [without_guided(result(0.1, 0.2, 0.3, 0.4)), without_guided(result(0.3, diverged=1))]
    ended = [completed(one, RUN) for one in runs]
    assert over_seeds(ended, "guided") == []
    assert [late(one, "guided") for one in ended] == [None, None]
    assert [point["auto"] for point in ended[1]["curve"]] == [0.3, 0.0, 0.0, 0.0]
    assert [found.n for _, found in over_seeds([*ended, result(0.1, 0.2, 0.3, 0.4)], "guided")] == [1] * 4


def test_tables_show_the_results_and_a_dash_for_missing_ones(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, SMALL))
    trials = [t for t in final(experiment, {("calm", "fixed"): None})]
    write_tables(experiment, {t.id: result(0.0, 0.5, 0.6 + 0.1 * t.seed) for t in trials}, folder=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| fixed | 0.001 | 2 | 65.0 ± 63.5 |" in text  # t(1) = 12.706, deviation 0.0707
    assert "| SGPO |  | 0 | – |" in text
    assert text.endswith("\n\nCode: 0.1.0, commit unknown.\n")
    assert "| method | calm | stale |" in text
    assert "| fixed | 65.0 ± 63.5 | – |" in text
    assert (tmp_path / "out" / "curves-calm.svg").stat().st_size > 1000
    assert [path.name for path in (tmp_path / "out").glob("*.svg")] == ["curves-calm.svg"]  # no point has an entropy


def test_methods_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """The differences are 10 and 20; `theirs` has no third seed. 15 ± 12.706 * 7.07 / sqrt(2)."""
    methods = {
        name: {"optim.lr": 1e-3, "algorithm.alpha0": 0.1 * i} for i, name in enumerate(("ours", "theirs", "new"), 1)
    }
    content = SMALL | {"settings": {}, "methods": methods, "seeds": [0, 1, 2], "reference": "ours"}
    experiment = load_experiment(write(tmp_path, content))
    ends = {"ours": (0.5, 0.6, 0.9), "theirs": (0.6, 0.8)}
    results = {
        trial.id: result(0.0, ends[trial.method][trial.seed]) | {"config": {"seed": trial.seed}}
        for trial in final(experiment, {("", name): None for name in ends})
        if trial.seed < len(ends[trial.method])
    }
    write_tables(experiment, results, folder=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    table = text.partition("Against ours, seed by seed, in points:\n\n")[2].partition("\n\n")[0].splitlines()
    assert table[2:] == ["| theirs | 2 | +15.0 ± 63.5 | +5.0 ± 21.2 |"]
    with pytest.raises(ConfigError, match="reference must be one of the methods"):
        load_experiment(write(tmp_path, content | {"reference": "nobody"}))


def test_the_page_shows_the_drawn_figures_and_older_ones_are_deleted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("curves-gone.svg", "alpha.svg", "own.svg"):
        (out / name).write_text("<svg/>")
    experiment = load_experiment(write(tmp_path, SMALL | {"settings": {}, "methods": {"SGPO": {"optim.lr": 1e-3}}}))
    trials = final(experiment, {("", "SGPO"): None})
    write_tables(experiment, {t.id: result(0.1, 0.2, alpha=0.0, entropy=0.3) for t in trials}, folder=out)
    text = (out / "README.md").read_text()
    assert "![pass rate over rollouts](curves.svg)\n\n![entropy over rollouts](entropy.svg)" in text
    assert {path.name for path in out.glob("*.svg")} == {"curves.svg", "entropy.svg", "own.svg"}
    assert "entropy leaves out" not in text


def test_every_column_of_a_table_counts_a_diverged_run(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, SMALL))
    trials = final(experiment, {("calm", "fixed"): None})
    runs = {0: result(0.2, 0.4, 0.6, 0.8), 1: result(0.2, diverged=1)}
    write_tables(experiment, {t.id: runs[t.seed] for t in trials}, folder=tmp_path / "out")
    row = next(line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if "| fixed | 0.001" in line)
    means = [cell.split(" ±")[0].strip() for cell in row.split("|")[3:]]
    assert means == ["2", "40.0", "20.0", "50.0", "50.0", "1", ""]


def test_lengths_and_patterns_of_the_last_quarter_have_a_table(tmp_path: Path) -> None:
    experiment = load_experiment(
        write(tmp_path, SMALL | {"settings": {}, "methods": {"SGPO": {}, "later": {}}, "tune": {}})
    )
    runs = [
        result(0.1, 0.2, 0.3, 0.4, length_auto=30.0, entropy=0.25, **{"patterns/leak": 0.5, "quotes/own": 0.25}),
        result(0.1, 0.2, 0.3, 0.4, length_auto=32.0, entropy=0.35, **{"patterns/leak": 0.5, "quotes/own": 0.25}),
    ]
    trials = [one for one in final(experiment, {("", "SGPO"): None}) if one.method == "SGPO"]
    write_tables(experiment, {t.id: runs[t.seed] for t in trials}, folder=tmp_path / "out")
    lines = (tmp_path / "out" / "README.md").read_text().splitlines()
    place = lines.index("| method | tokens | with leak, % | quoting the context, % | entropy, nats per token |")
    assert lines[place + 2] == "| SGPO | 31.0 ± 12.7 | 50.0 ± 0.0 | 25.0 ± 0.0 | 0.300 ± 0.635 |"


def test_results_without_lengths_have_no_such_table(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, SMALL | {"tune": {}}))
    trials = final(experiment, {("calm", "SGPO"): None})
    write_tables(experiment, {t.id: result(0.1, 0.2) for t in trials}, folder=tmp_path / "out")
    assert "| method | tokens |" not in (tmp_path / "out" / "README.md").read_text()


def text_of(tmp_path: Path, **changes: Any) -> str:
    write_tables(load_experiment(write(tmp_path, SMALL | changes)), {}, folder=tmp_path / "out")
    return (tmp_path / "out" / "README.md").read_text()


def test_a_caption_gives_the_budget_the_problems_and_the_tuning(tmp_path: Path) -> None:
    text = text_of(tmp_path)
    assert text.count("Rollouts for each trial: 1,152 (6 steps of 16 problems).") == 1
    assert (
        "of 200 test problems at the end, of 200 others for validation along the way, one sample of each at T = 1."
        in text
    )
    assert "in trials with other seeds (7, 8); given: fixed." in text
    assert "| alone, at the end (test) | alone, a third of the way (validation) | alone, best (validation) |" in text


def test_a_caption_says_so_if_nothing_was_tuned(tmp_path: Path) -> None:
    text = text_of(tmp_path, tune={})
    assert "Learning rates were given; none was tuned." in text
    assert "seeds (" not in text


def test_a_caption_gives_the_sampling_of_each_setting_and_the_methods_without_rollouts(tmp_path: Path) -> None:
    common = SMALL["common"] | {"tasks.held_out": 50, "evaluation.samples": 4, "evaluation.temperature": 0.6}
    settings = {"calm": {}, "long": {"steps": 12, "evaluation.top_p": 0.9}}
    methods = {"SGPO": {}, "SFT": {"algorithm.objective": "sft", "optim.lr": 1e-3}}
    tune = SMALL["tune"] | {"setting": "calm"}
    text = text_of(tmp_path, common=common, settings=settings, methods=methods, tune=tune)
    assert "chosen by the validation problems, in calm for all settings, in trials" in text
    calm, long = text.split("## calm")[1].split("## long")
    assert "Rollouts for each trial: 1,152 (6 steps of 16 problems); none for SFT: demonstrations alone." in calm
    assert "Pass rates: of 50 test problems at the end, of 50 others" in calm
    assert "4 samples of each at T = 0.6." in calm
    assert "Rollouts for each trial: 2,304 (12 steps of 16 problems); none for SFT: demonstrations alone." in long
    assert "4 samples of each at T = 0.6 and top-p 0.9." in long


def tuned_text(tmp_path: Path, scores: dict[float, list[float]], **changes: Any) -> str:
    """The page of an experiment whose tuning gave `scores`: learning rate of SGPO -> score of each seed, in calm."""
    content = SMALL | {"tune": {"rates": list(scores), "seeds": [7, 8]}} | changes
    experiment = load_experiment(write(tmp_path, content))
    results = {
        trial(experiment, ("calm", "SGPO"), rate=rate, seed=seed).id: result(0.0, score)
        for rate, found in scores.items()
        for seed, score in zip((7, 8), found, strict=False)
    }
    write_tables(experiment, results, folder=tmp_path / "out")
    return (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("scores", "shown"),
    [
        ({1e-4: [0.1, 0.1], 1e-3: [0.5, 0.7], 1e-2: [0.3, 0.3]}, "0.001"),
        ({1e-4: [0.1, 0.1], 1e-3: [0.2, 0.4], 1e-2: [0.5, 0.7]}, "0.01 (edge)"),
        ({1e-3: [0.5, 0.5], 1e-4: [0.5, 0.5]}, "0.0001 (edge)"),
        ({1e-3: [0.5, 0.5]}, "0.001"),
    ],
)
def test_a_rate_at_the_edge_of_the_grid_is_marked(tmp_path: Path, scores: dict[float, list[float]], shown: str) -> None:
    text = tuned_text(tmp_path, scores)
    assert f"| SGPO | {shown} | 0 |" in text
    assert ("(edge): the lowest or highest of the rates" in text) == ("edge" in shown)
    assert "| fixed | 0.002 | 0 |" in text  # given and not tuned, so it is never marked


def test_the_tuning_table_has_the_score_of_every_rate(tmp_path: Path) -> None:
    text = tuned_text(tmp_path, {1e-4: [0.1, 0.2], 1e-3: [0.5, 0.7], 1e-2: [0.3, 0.3]}).split("## Tuning")[1]
    assert "mean of 2 seeds (7, 8), in per cent; a run that diverged counts 0." in text
    calm, stale = text.split("Tried in calm:")[1].split("Tried in stale:")
    assert "| method | 0.0001 | 0.001 | 0.01 |" in calm
    assert "| SGPO | 15.0 | **60.0** | 30.0 |" in calm
    assert "| GRPO | – | – | – |" in calm
    assert "| SGPO | – | – | – |" in stale
    assert "fixed" not in text


def test_incomplete_tuning_chooses_no_rate_and_is_marked(tmp_path: Path) -> None:
    in_calm = {"tune": {"rates": [1e-4, 1e-3], "seeds": [7, 8], "setting": "calm"}}
    text = tuned_text(tmp_path, {1e-4: [0.1, 0.2], 1e-3: [0.5]}, **in_calm)
    assert "| SGPO |  | 0 |" in text
    assert "| SGPO | 15.0 | 50.0 (1 of 2) |" in text.split("Tried in calm:")[1]
    assert "Tried in stale" not in text
    assert "## Tuning" not in text_of(tmp_path, tune={})
