"""Experiment files, their trials and tuned learning rates, without a process."""

import re
from pathlib import Path
from typing import Any

import pytest
from experiment_support import SMALL, result, write

from sgpo_async.cli.main import main
from sgpo_async.config.experiment import Base, load_experiment
from sgpo_async.errors import ConfigError
from sgpo_async.experiments.identity import recipe, same_recipe
from sgpo_async.experiments.plan import (
    base_levels,
    best_rates,
    cells,
    check_budget,
    count_tuning,
    final,
    tuning,
    validation,
)

SHIPPED = sorted(Path("configs/experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_experiment_is_valid_and_has_equal_budgets(path: Path) -> None:
    experiment = load_experiment(path)
    assert min(check_budget(experiment).values()) > 0
    assert len({trial.id for trial in tuning(experiment, {})}) == len(tuning(experiment, {}))
    assert {name for level in base_levels(experiment) for name in level} == set(experiment.bases)


def test_the_overrides_of_a_trial_give_its_configuration(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, SMALL))
    trials = tuning(experiment, {}) + final(experiment, dict.fromkeys(cells(experiment), 2e-4))
    for trial in trials + final(experiment, dict.fromkeys(cells(experiment))):
        assert trial.run == experiment.run(trial.overrides)
        assert (trial.run.seed, trial.run.optim.lr) == (trial.seed, trial.rate)


def test_bases_of_the_same_name_have_the_same_recipe() -> None:
    """Shipped experiments share one folder, which refuses a base of the same name with another recipe."""
    recipes: dict[str, Any] = {}
    for experiment in map(load_experiment, SHIPPED):
        for name in experiment.bases:
            assert same_recipe(recipes.setdefault(name, recipe(experiment, name)), recipe(experiment, name)), name
    assert len(recipes) > 4


def test_common_settings_and_methods_combine_and_a_given_rate_is_not_tuned(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, SMALL))
    assert len(cells(experiment)) == 6
    tried = tuning(experiment, {})
    assert len(tried) == 2 * 2 * 2 * 2  # methods to tune x settings x rates x seeds
    assert {trial.method for trial in tried} == {"SGPO", "GRPO"}
    stale = [trial for trial in tried if (trial.setting, trial.method) == ("stale", "GRPO")]
    run = experiment.run(stale[0].overrides)
    assert (run.hub.max_lag, run.algorithm.objective, run.rollout.size, run.steps) == (4, "grpo", 12, 6)
    assert {(trial.rate, trial.seed) for trial in stale} == {(1e-4, 7), (1e-4, 8), (1e-3, 7), (1e-3, 8)}


def test_a_method_may_begin_with_the_keys_of_a_configuration(tmp_path: Path) -> None:
    own = {"from": "builtin:methods/opsd", "algorithm.kl_clip": 0.1, "rollout.autonomous": 12}
    experiment = load_experiment(write(tmp_path, SMALL | {"methods": {"GRPO": SMALL["methods"]["GRPO"], "OPSD": own}}))
    run = experiment.run(experiment.overrides(experiment.keys("stale", "OPSD")))
    assert (run.algorithm.objective, run.algorithm.kl_clip, run.tasks.context) == ("opsd", 0.1, "response")
    assert (run.hub.max_lag, run.rollout.guided, run.steps) == (4, 0, 6)


def test_the_configuration_may_lie_beside_the_file_and_one_key_may_differ_by_setting(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("algorithm: {objective: grpo}\nrollout: {autonomous: 12, guided: 0}\n")
    own = {"from": "own.yaml", "hub.max_lag": {"calm": 1, "stale": 3}}
    experiment = load_experiment(write(tmp_path, SMALL | {"methods": {"SGPO": {}, "own": own}}))
    runs = [experiment.run(experiment.overrides(experiment.keys(setting, "own"))) for setting in ("calm", "stale")]
    assert [(run.algorithm.objective, run.hub.max_lag) for run in runs] == [("grpo", 1), ("grpo", 3)]


def test_a_base_has_the_numbers_of_its_domain_unless_the_file_gives_others() -> None:
    assert Base().pretraining == {
        "domain": "cues", "contexts": False, "seed": 7, "steps": 1200, "p_true": 0.44, "p_favourite": 0.50
    }  # fmt: skip
    assert Base(domain="chains", steps=9).pretraining == {
        "domain": "chains", "contexts": False, "seed": 7, "steps": 9, "p_true": 0.36, "p_favourite": 0.58
    }  # fmt: skip


def test_the_best_rate_has_the_best_mean_over_seeds_and_needs_all_of_its_trials(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, SMALL))
    tried = [t for t in tuning(experiment, {}) if (t.setting, t.method) == ("calm", "SGPO")]
    pass_rate = {(1e-4, 7): 0.5, (1e-4, 8): 0.5, (1e-3, 7): 0.9, (1e-3, 8): 0.3}
    results = {trial.id: result(0.0, pass_rate[trial.rate, trial.seed]) for trial in tried}
    assert best_rates(experiment, results)["calm", "SGPO"] == 1e-3
    results[tried[-1].id] = result(0.0, 0.9, diverged=3)
    assert best_rates(experiment, results)["calm", "SGPO"] == 1e-4
    del results[tried[-1].id]
    assert ("calm", "SGPO") not in best_rates(experiment, results)
    assert {best_rates(experiment, results)[setting, "fixed"] for setting in ("calm", "stale")} == {None}


def test_only_the_best_rates_with_the_first_seed_are_tried_with_the_others(tmp_path: Path) -> None:
    tune = {"rates": [1e-4, 1e-3, 4e-3, 1e-2], "seeds": [7, 8, 9], "finalists": 2, "setting": "calm"}
    experiment = load_experiment(write(tmp_path, SMALL | {"tune": tune}))
    tried = [t for t in tuning(experiment, {}) if t.method == "SGPO"]
    assert [(t.rate, t.seed) for t in tried] == [(rate, 7) for rate in tune["rates"]]
    first = {1e-4: 0.4, 1e-3: 0.6, 4e-3: 0.4, 1e-2: 0.1}
    results = {t.id: result(0.0, first[t.rate]) for t in tried}
    assert best_rates(experiment, results).get(("calm", "SGPO")) is None, "only the first seed"
    added = [t for t in tuning(experiment, results) if t.method == "SGPO" and t.seed > 7]
    assert [(t.rate, t.seed) for t in added] == [(1e-4, 8), (1e-4, 9), (1e-3, 8), (1e-3, 9)], "the lower of equals"
    results |= {t.id: result(0.0, {1e-4: 0.9, 1e-3: 0.7}[t.rate]) for t in added}
    assert best_rates(experiment, results)["stale", "SGPO"] == 1e-4
    methods = len({t.method for t in tuning(experiment, {})})
    assert count_tuning(experiment) == methods * (4 + 2 * 2)


def test_rates_may_be_tuned_in_one_setting_for_all(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, SMALL | {"tune": SMALL["tune"] | {"setting": "calm"}}))
    tried = tuning(experiment, {})
    assert {trial.setting for trial in tried} == {"calm"}
    assert len(tried) == 2 * 2 * 2  # methods to tune x rates x seeds
    found = best_rates(experiment, {trial.id: result(0.0, trial.rate) for trial in tried})
    assert found["calm", "SGPO"] == found["stale", "SGPO"] == 1e-3


def test_two_experiments_share_equal_trials(tmp_path: Path) -> None:
    one = load_experiment(write(tmp_path, SMALL))
    renamed = SMALL | {
        "common": {"local.ranks": 1, "evaluation.every": 2},
        "settings": {"quiet": {"steps": 6}},
        "methods": {"ours": {}},
    }
    other = load_experiment(write(tmp_path, renamed))
    assert {t.id for t in tuning(other, {})} < {t.id for t in tuning(one, {})}


def test_final_trials_use_the_best_rates_and_are_not_shared_with_tuning(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, SMALL))
    trials = final(experiment, {("calm", "SGPO"): 1e-4, ("stale", "fixed"): None})
    assert [(t.method, t.rate, t.seed) for t in trials] == [
        ("SGPO", 1e-4, 0),
        ("fixed", 2e-3, 0),
        ("SGPO", 1e-4, 1),
        ("fixed", 2e-3, 1),
    ]
    assert not {t.id for t in trials} & {t.id for t in tuning(experiment, {})}


def test_a_method_with_more_samples_is_refused(tmp_path: Path) -> None:
    greedy = SMALL | {"methods": SMALL["methods"] | {"greedy": {"rollout.autonomous": 20}}}
    with pytest.raises(
        ConfigError, match=r"methods\.greedy must have the sample budget of the other methods in calm, 1152 rollouts"
    ):
        check_budget(load_experiment(write(tmp_path, greedy)))
    alone = greedy | {"settings": {}, "methods": {"SGPO": {}, "greedy": {"rollout.autonomous": 20}}}
    with pytest.raises(
        ConfigError, match=r"methods\.greedy must have the sample budget of the other methods, 1152 rollouts"
    ):
        check_budget(load_experiment(write(tmp_path, alone)))


@pytest.mark.parametrize("greedy_in", ["calm", "stale"])
def test_more_samples_in_one_setting_alone_are_refused(tmp_path: Path, greedy_in: str) -> None:
    autonomous = {"calm": 12, "stale": 12} | {greedy_in: 96}
    greedy = SMALL | {
        "methods": SMALL["methods"] | {"GRPO": SMALL["methods"]["GRPO"] | {"rollout.autonomous": autonomous}}
    }
    rule = rf"methods\.GRPO must have the sample budget of the other methods in {greedy_in}, 1152 rollouts, got 9216"
    with pytest.raises(ConfigError, match=rule):
        check_budget(load_experiment(write(tmp_path, greedy)))


def test_settings_may_have_different_budgets(tmp_path: Path) -> None:
    longer = SMALL | {"settings": {"calm": {}, "stale": {"steps": 12}}}
    assert check_budget(load_experiment(write(tmp_path, longer))) == {"calm": 1152, "stale": 2304}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {}}, "unknown key method; did you mean methods?"),
        ({"methods": {"SGPO": {"algorithm.alfa": 1}}}, "unknown key algorithm.alfa; did you mean algorithm.alpha"),
        (
            {"methods": {"SGPO": {"optim.lr": {"calm": 1e-3}}}},
            r"methods\.SGPO\.optim\.lr must have a value for each of the settings calm, stale, got {'calm': 0.001}",
        ),
        ({"methods": {"SGPO": {"model.path": "base:none"}}}, "model.path must name one of the bases"),
        (
            {"bases": {"warm": {"start": "base:none"}}},
            r"bases\.warm\.start must name one of the bases warm, got 'base:none'",
        ),
        ({"methods": {"X": {"from": "builtin:methods/opds"}}}, "did you mean builtin:methods/opsd"),
        ({"methods": {"X": {"from": 5}}}, "methods.X.from must be a path, relative to this file, or the name"),
        ({"bases": {"warm": {"train": {"steps": 2}}}}, r"bases\.warm\.start must name the model that train continues"),
        (
            {"bases": {"warm": {"train": {"steps": 2}, "seed": 3}}},
            "bases.warm must have no setting beside start and train",
        ),
        ({"seeds": []}, r"seeds must name at least one seed, got \[\]"),
        (
            {"tune": {"rates": [1e-3], "seeds": [1, 7]}},
            r"tune\.seeds must differ from seeds 0, 1, because .* not also judge it, got \[1, 7\]",
        ),
        ({"tune": {"rates": [1e-3], "seeds": []}}, r"tune\.seeds must name at least one seed, got \[\]"),
        (
            {"common": {"optim.lr": 1e-3}},
            r"common\.optim\.lr must be absent, because tune\.rates sets the learning rate, got 0\.001",
        ),
        (
            {"settings": {"calm": {"optim.lr": 1e-3}, "stale": {}}, "tune": {"rates": [1e-4], "setting": "calm"}},
            r"settings\.calm\.optim\.lr must be absent, because tune\.rates sets the learning rate, got 0\.001",
        ),
        (
            {"settings": {"a b": {}, "A-b": {}}},
            r"settings must have names that still differ as file names \(.*\), got 'a b, A-b'",
        ),
        ({"tune": {"setting": "cold"}}, r"tune\.setting must be one of the settings calm, stale, got 'cold'"),
    ],
)
def test_an_error_is_one_line_that_names_the_file(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, SMALL | change)
    with pytest.raises(ConfigError, match=message) as caught:
        load_experiment(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_base_comes_after_the_base_that_it_starts_from(tmp_path: Path) -> None:
    bases = {"last": {"start": "base:middle"}, "middle": {"start": "base:first"}, "first": {}, "other": {}}
    assert base_levels(load_experiment(write(tmp_path, SMALL | {"bases": bases}))) == [
        ["first", "other"],
        ["middle"],
        ["last"],
    ]
    circle = {"a": {"start": "base:b"}, "b": {"start": "base:a"}}
    with pytest.raises(ConfigError, match="bases must not start from each other in a circle, got"):
        base_levels(load_experiment(write(tmp_path, SMALL | {"bases": circle})))


def test_a_rate_is_judged_by_the_last_quarter_of_its_curve() -> None:
    assert validation(result(0.0, 0.9, 0.2, 0.1)) == pytest.approx(0.1)
    assert validation(result(0.0, 0.9, 0.2, 0.1, 0.5, 0.5, 0.2, 0.4)) == pytest.approx(0.3)
    assert validation(result(0.0, 0.9, diverged=1)) == 0.0


def test_a_dry_run_of_several_files_says_how_many_trials_there_are_in_all(capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"configs/experiments/{name}.yaml" for name in ("clip", "warm")]
    assert main(["experiment", files[0], "--dry-run"]) == 0
    assert "in all" not in capsys.readouterr().out
    assert main(["experiment", *files, "--dry-run"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    trials = [int(number) for line in lines for number in re.findall(r": (\d+) trials", line)]
    assert len(trials) == 2 and last.startswith(f"in all {sum(trials):,} trials and ")
