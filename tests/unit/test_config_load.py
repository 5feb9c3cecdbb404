"""Loading a configuration: values get the types of their fields, and an error is one line."""

import argparse
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from sgpo_async.cli.options import config_arguments
from sgpo_async.config import Run, by_key_path, from_plain, load, to_plain, to_yaml
from sgpo_async.config.load import read_yaml
from sgpo_async.errors import ConfigError

CONFIGS = sorted(Path("configs").glob("*.yaml"))  # not those in experiments/, which hold several configurations each


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_every_shipped_configuration_loads(path: Path) -> None:
    run = load(path)
    assert from_plain(to_plain(run)) == run


def test_the_default_is_sharp_sgpo_and_paper_yaml_restores_the_paper_s_setting(empty: Path) -> None:
    default, paper = load(empty).algorithm, load(empty, ["configs/paper.yaml"]).algorithm
    assert (default.teacher, default.limiter, default.alpha0, default.alpha_max) == ("frozen", "none", 1.0, 1.6)
    assert (default.teacher_temperature, default.distil_skip) == (0.5, 1)
    assert (paper.delta, paper.alpha0, paper.gamma, paper.alpha_max) == (1.0, 0.5, 0.1, 0.8)
    assert (paper.eps_low, paper.eps_high) == (0.2, 0.28)
    assert (paper.objective, paper.divergence, paper.target) == ("sgpo", "forward", "reachable")
    assert (paper.teacher, paper.limiter, paper.weight) == ("self", "mask", "adaptive")
    assert (paper.policy_gradient, paper.pass_rates, paper.guide_gate) == (True, "observed", 0.0)
    changed = {"teacher", "limiter", "alpha0", "alpha_max", "teacher_temperature", "distil_skip"}
    assert {key for key in asdict(default) if asdict(default)[key] != asdict(paper)[key]} == changed


def test_sharp_yaml_restores_the_default_in_a_recipe_of_the_paper(empty: Path) -> None:
    recipe = "configs/paper-qwen2.5-7b.yaml"
    assert load(recipe).algorithm != load(empty).algorithm
    assert load(recipe, ["configs/sharp.yaml"]).algorithm == load(empty).algorithm


OF_THE_PAPER = ["configs/demo-paper.yaml", *map(str, CONFIGS[0].parent.glob("paper-*.yaml"))]


def test_paper_yaml_sets_every_key_that_it_reads(empty: Path) -> None:
    """The paper's setting depends on no default: only keys that it does not read are absent."""
    named = read_yaml(Path("configs/paper.yaml"), Run)
    assert list(named) == ["algorithm"]
    unread = {
        "quantile",
        "teacher_decay",
        "teacher_every",
        "teacher_dtype",
        "teacher_top_k",
        "alpha",
        "luffy_gamma",
        "hpt_gate",
        "distilled",
        "rlsd",
        "rlcsd",
        "iw_gamma",
    }
    assert named["algorithm"].keys() == asdict(load(empty).algorithm).keys() - unread
    for path in OF_THE_PAPER:
        assert read_yaml(Path(path), Run)["algorithm"] == named["algorithm"]


@pytest.mark.parametrize("path", OF_THE_PAPER)
def test_configurations_of_the_paper_have_the_algorithm_of_paper_yaml(path: str, empty: Path) -> None:
    assert load(path).algorithm == load(empty, ["configs/paper.yaml"]).algorithm


def test_overrides_replace_values_of_the_file_and_the_last_override_wins(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optim:\n  lr: 1e-6\n  grad_clip: 0.5\n")
    run = load(path, ["optim.lr=3e-4", "optim.lr=5e-4"])
    assert run.optim.lr == 5e-4
    assert run.optim.grad_clip == 0.5


def test_a_second_file_overrides_the_first_and_key_value_overrides_both(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("steps: 3\nalgorithm: {teacher: frozen, gamma: 0.3}\n")
    second.write_text("algorithm: {teacher: self, alpha0: 0.7}\n")
    run = load(first, [str(second), "algorithm.alpha0=0.9"])
    assert (run.steps, run.algorithm.teacher, run.algorithm.gamma, run.algorithm.alpha0) == (3, "self", 0.3, 0.9)
    second.write_text("algorithm: {teechar: self}\n")
    with pytest.raises(
        ConfigError, match=r"second\.yaml: unknown key algorithm\.teechar; did you mean algorithm\.teacher"
    ):
        load(first, [str(second)])
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load(first, [str(tmp_path / "none.yaml")])


def test_the_resolved_yaml_loads_to_the_same_run(tmp_path: Path) -> None:
    algorithm = "{teacher_temperature: 1, kl_correction: {mode: sequence, bound: .inf}}"
    run = load(_write(tmp_path, f"steps: 7\nalgorithm: {algorithm}\n"))
    assert load(_write(tmp_path, to_yaml(run))) == run


def _write(folder: Path, text: str) -> Path:
    path = folder / "again.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optm.lr=3", ["argument 'optm.lr=3': unknown key optm; did you mean optim?"]),
        ("optim.lrr=3", ["argument 'optim.lrr=3': unknown key optim.lrr; did you mean optim.lr?"]),
        ("qqqqq=3", ["argument 'qqqqq=3': unknown key qqqqq; known keys: ", "steps"]),
        ("steps=abc", ["steps", "'abc'", "Integer"]),
        ("steps=null", ["steps", "int"]),
        ("hub.max_leases=32769", ["hub.max_leases must be in [1, 32768], got 32769"]),
        ("hub.max_lag=1.5", ["hub.max_lag", "1.5"]),
        ("algorithm.teacher=fozen", ["algorithm.teacher", "fozen", "self", "frozen"]),
        ("algorithm.objective=ppo", ["algorithm.objective", "ppo", "luffy"]),
        ("algorithm.quantile=1.5", ["algorithm.quantile must be in [0, 1], got 1.5"]),
        ("algorithm.teacher_every=0", ["algorithm.teacher_every must be >= 1, got 0"]),
        (
            "algorithm={teacher: ema, teacher_dtype: bfloat16}",
            ["algorithm.teacher_dtype must be float32 with algorithm.teacher=ema: ", "got 'bfloat16'"],
        ),
        ("algorithm.teacher_temperature=0", ["algorithm.teacher_temperature must be > 0, got 0"]),
        (
            "algorithm={teacher_temperature: 0.5, kl_correction: {mode: token}}",
            [
                "algorithm.teacher_temperature must be 1 with algorithm.teacher=behaviour",
                "with algorithm.kl_correction.mode other than none",
                "got 0.5; add algorithm.teacher_temperature=1",
            ],
        ),
        (
            "algorithm={objective: grpo, policy_gradient: false}",
            ["algorithm.policy_gradient must be true unless algorithm.objective=sgpo or pi-distill", "got False"],
        ),
        (
            "algorithm={weight: fixed, pass_rates: corrected}",
            ["algorithm.pass_rates must be observed unless ", "weight=adaptive", "got 'corrected'"],
        ),
        (
            "algorithm.kl_correction.mode=token-mask",
            ["algorithm.kl_correction.bound must be > 1 with mode token-mask", "got 1.0"],
        ),
        (
            "algorithm.grpo_correction={mode: clip, bound: 1}",
            ["algorithm.grpo_correction.bound must be > 1 with mode clip", "got 1"],
        ),
        (
            "algorithm.kl_correction.mode=clip",
            ["algorithm.kl_correction.mode must not be clip, which needs advantages"],
        ),
        (
            "algorithm.kl_correction.mode=sequence-geometric",
            ["kl_correction.bound must be > 1 with mode sequence-geometric"],
        ),
        (
            "algorithm.grpo_correction={mode: token-mask, bound: 1}",
            ["algorithm.grpo_correction.bound must be > 1 with mode token-mask", "got 1.0"],
        ),
        ("algorithm.grpo_correction.bound=0.5", ["algorithm.grpo_correction.bound must be >= 1, got 0.5"]),
        (
            "algorithm={objective: hpt, hpt_gate: 8}",
            ["algorithm.hpt_gate must be < rollout.autonomous = 8, got 8; to train on"],
        ),
        ("optim.lr=inf", ["optim.lr must be a finite number, got inf"]),
        ("optim.lr=.inf", ["optim.lr must be a finite number, got inf"]),
        ("optim.lr=.nan", ["optim.lr must be > 0, got nan"]),
        ("optim.weight_decay=.nan", ["optim.weight_decay must be >= 0, got nan"]),
        ("optim.weight_decay=.inf", ["optim.weight_decay must be a finite number, got inf"]),
        ("sft.lr=.inf", ["sft.lr must be a finite number, got inf"]),
        ("hub.stall_s=.inf", ["hub.stall_s must be a finite number, got inf"]),
        ("engine.sglang.phase_timeout_s=.inf", ["engine.sglang.phase_timeout_s must be a finite number, got inf"]),
        ("learner.mismatch_bound=.nan", ["learner.mismatch_bound must be >= 0, got nan"]),
        ("steps=12:30", ["steps", "'12:30'", "Integer"]),
        ("steps=0o17", ["steps", "0o17", "Integer"]),
        (f"steps={'1' * 5000}", ["steps", "digits"]),
        (f"engine.sglang.urls={'[' * 20000}", ["engine.sglang.urls", "recursion"]),
        ("out=~no-such-user/runs", ["out must not begin with ~, because there is no such home folder"]),
        ("evaluation.benchmarks.a.sample=2", ["unknown key evaluation.benchmarks.a.sample; did you mean "]),
        ("optim=3", ["argument 'optim=3': optim must be a section with keys, got 3"]),
        ("optim.lr=-1", ["optim.lr must be > 0, got -1.0"]),
        ("optim.weight_decay=-1", ["optim.weight_decay must be >= 0, got -1.0"]),
        ("learner.batch_timeout_s=0", ["learner.batch_timeout_s must be >= 3 * hub.heartbeat_s = 3, got 0.0"]),
        (
            "hub.address=tcp://0.0.0.0:1",
            ["hub.keys must name a folder of keys", "beyond loopback (0.0.0.0), got ''; create", "sgpo-async keys"],
        ),
        (
            "hub={address: 'tcp://0.0.0.0:1', keys: k}",
            ["hub.address must name the one address at which actors reach", "0.0.0.0"],
        ),
        (
            "hub.dashboard=8265",
            ["hub.dashboard must look like HOST:PORT, got '8265'; on this machine alone: 127.0.0.1:"],
        ),
        ("hub.dashboard=localhost:99999", ["hub.dashboard must look like HOST:PORT", "99999"]),
        ("hub.address=localhost", ["hub.address must look like tcp://HOST:PORT, got 'localhost'"]),
        ("rollout.guided=0", ["rollout.guided must be >= 1 when algorithm.objective=sgpo, got 0"]),
        ("rollout.top_p=0", ["rollout.top_p must be in (0, 1], got 0"]),
        ("rollout.top_p=0.95", ["rollout.top_k must be > 0 with rollout.top_p below 1", "got 0"]),
        ("rollout.top_k=1", ["rollout.top_k must be 0 or in [2, 2048], got 1"]),
        ("rollout={top_p: 0.95, top_k: 4096}", ["rollout.top_k must be 0 or in [2, 2048], got 4096"]),
        ("learner.problems_per_step=1", ["learner.problems_per_step must be >= local.ranks = 2, ", "got 1"]),
        ("engine.deterministic=true", ["local.actors must be 1 when engine.deterministic=true, got 2"]),
        ("hub.max_message_mb=0", ["hub.max_message_mb must be >= 1, ", "up to 1 MB", "got 0; raise it"]),
        (
            "rollout={max_new_tokens: 100000}",
            ["hub.max_message_mb must be >= 586, ", "up to 586 MB", "got 512; raise it"],
        ),
        (
            "learner.offload_activations=true",
            ["learner.offload_activations must be false with learner.recompute=0: ", "host memory, got True"],
        ),
        ("learner.keep_checkpoints=0", ["learner.keep_checkpoints must be >= 1, got 0"]),
        ("learner.mismatch_bound=-1", ["learner.mismatch_bound must be >= 0, got -1.0"]),
        ("tasks.reward_workers=0", ["tasks.reward_workers must be >= 1, got 0"]),
        ("tasks.reward_limit_s=0", ["tasks.reward_limit_s must be > 0, got 0.0"]),
        ("tasks.source=file", ["tasks.path must name the problems when tasks.source=file, got ''"]),
        ("optim.lr=fast", ["optim.lr", "fast"]),
        ("steps=1e3", ["steps", "1e3", "Integer"]),
        ("optim={lr: 1", ["optim={lr: 1", "not YAML"]),
        ("steps", ["argument 'steps': an override must look like key=value"]),
        (
            "optim={lr: 1, lr: 2}",
            ["argument 'optim={lr: 1, lr: 2}'", "lr occurs twice in its section; keep one of them"],
        ),
    ],
)
def test_an_error_is_one_line_with_path_rule_and_value(empty: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(empty, [override])
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", ["1e5", "2026-07-01", "run-1e5"])
def test_a_value_has_the_type_of_its_field(tmp_path: Path, name: str) -> None:
    for run in (
        load(_write(tmp_path, f"name: {name}\noptim: {{lr: 2e-6, grad_clip: 3}}\n")),
        load(_write(tmp_path, ""), [f"name={name}", "optim.lr=2e-6", "optim={grad_clip: 3}"]),
    ):
        assert run.name == name
        assert (run.optim.lr, run.optim.grad_clip) == (2e-6, 3.0)


@pytest.mark.parametrize(
    "text",
    ["007", "no", "on", "1.10", "12:30", "1_000", "0x10", "null", "1e5", "a: b", "a #b", "[x", "{", "*", " a", "Ä"],
)
def test_a_text_on_the_command_line_stays_as_typed(empty: Path, text: str) -> None:
    run = load(
        empty, [f"name={text}", "tasks.source=file", f"tasks.path={text}", f"evaluation.benchmarks.a.path={text}"]
    )
    assert (run.name, run.tasks.path, run.evaluation.benchmarks["a"].path) == (text, text, text)
    assert load(empty, [f"engine.sglang.args={text!r}"]).engine.sglang.args == text  # quotes of YAML are dropped
    assert load(empty, [f"engine.sglang.args='{text}' b"]).engine.sglang.args == f"'{text}' b"


@pytest.mark.parametrize("text", ["007", "no", "1.10", "12:30", "1_000", "0x10", "2026-07-01"])
def test_a_text_in_a_file_stays_as_typed(tmp_path: Path, text: str) -> None:
    benchmarks = f"evaluation: {{benchmarks: {{a: {{path: {text}}}}}}}"
    run = load(
        _write(tmp_path, f"name: {text}\ntasks:\n  source: file\n  path: {text}\n{benchmarks}\n"),
        ["tasks={held_out: 7}"],
    )
    assert (run.name, run.tasks.path, run.evaluation.benchmarks["a"].path) == (text, text, text)
    assert load(_write(tmp_path, to_yaml(run))) == run
    assert load(_write(tmp_path, ""), [f"tasks={{source: file, path: {text}}}"]).tasks.path == text
    for override in (f"tasks.columns={{answer: {text}}}", f"tasks.columns.answer={text}"):
        assert load("", ["tasks={source: file, path: x}", override]).tasks.columns == {"answer": text}
    assert load("", ["tasks={source: file, path: x}", "tasks.answer_after=####"]).tasks.answer_after == "####"


def test_a_whole_number_with_zeros_before_it_is_decimal(tmp_path: Path) -> None:
    assert load(_write(tmp_path, "steps: 0100\n"), ["seed=007", "local.ranks=02"]).steps == 100
    run = load(_write(tmp_path, ""), ["steps=0100", "seed=007", "optim.lr=01.5"])
    assert (run.steps, run.seed, run.optim.lr) == (100, 7, 1.5)


def test_a_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = ["out", "model.path", "tasks.path", "sft.path", "sft.validation", "hub.keys", "engine.sglang.python"]
    keys += ["engine.sglang.folder", "evaluation.benchmarks.a.path"]
    path = _write(
        tmp_path, "out: ~/x y/out\nevaluation: {benchmarks: {a: {path: ~/x y/evaluation.benchmarks.a.path}}}\n"
    )
    for run in (
        load("", ["tasks.source=file", *(f"{key}=~/x y/{key}" for key in keys)]),
        load(path, ["tasks.source=file", *(f"{key}=~/x y/{key}" for key in keys[1:-1])]),
    ):
        plain = dict(by_key_path(to_plain(run)))
        assert {key: plain[key] for key in keys} == {key: f"/home/me/x y/{key}" for key in keys}
    assert load(_write(tmp_path, ""), ["out=~", "name=~"]).out == "/home/me"
    assert load(_write(tmp_path, ""), ["name=~", "tasks.source=file", "tasks.path=a/~/b"]).tasks.path == "a/~/b"
    assert load(_write(tmp_path, ""), ["name=~"]).name == "~"  # is not a path


def test_every_setting_whose_name_says_so_is_a_path() -> None:
    def names(section: type, prefix: str = "") -> set[str]:
        found = set()
        for one in fields(section):
            kind = get_type_hints(section)[one.name]
            found |= names(kind, f"{prefix}{one.name}.") if is_dataclass(kind) else set()
            if kind is str and {"path", "folder", "out", "keys", "python", "validation"} & {one.name}:
                assert one.metadata.get("path"), f"{prefix}{one.name} needs the metadata PATH"
                found.add(f"{prefix}{one.name}")
        return found

    assert len(names(Run)) == 8


def test_an_existing_file_is_a_file_although_its_name_has_an_equals_sign(tmp_path: Path) -> None:
    for name in ("lr=3e-4.yaml", "steps=9", "a=b/c.yaml"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("steps: 3\n")
        assert load("", [str(file), "seed=5"]).steps == 3
        arguments = argparse.Namespace(config=str(file), overrides=[str(file), "seed=5"])
        assert config_arguments(arguments, "a=b") == [str(file), str(file), "seed=5", "a=b"]
    with pytest.raises(ConfigError, match=r"unknown key .*steps"):
        load("", [str(tmp_path / "steps=8")])
    assert (
        load("", ["tasks.source=file", f"tasks.path={'x' * 5000}"]).tasks.path == "x" * 5000
    )  # too long for a file's name


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_a_file_in_another_encoding_is_named_with_its_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes("steps: 3\nname: Übung\n".encode(encoding))
    with pytest.raises(ConfigError, match=r"run\.yaml:[12]: must be UTF-8, got byte 0x") as caught:
        load(path)
    assert "\n" not in str(caught.value)


MAY_BE_INFINITE = {f"algorithm.{name}_correction.bound" for name in ("grpo", "kl")}
MAY_BE_INFINITE |= {"algorithm.kl_clip", "optim.grad_clip", "learner.mismatch_bound", "hub.canary_tolerance"}


def test_only_a_number_that_documents_it_may_be_infinite() -> None:
    run = load("", [f"{key}=.inf" for key in MAY_BE_INFINITE])
    assert {key for key, value in by_key_path(to_plain(run)) if value == float("inf")} == MAY_BE_INFINITE
    for key, value in by_key_path(to_plain(Run())):
        if isinstance(value, float) and key not in MAY_BE_INFINITE:
            for number in (".inf", ".nan"):
                with pytest.raises(ConfigError, match=re.escape(key)):
                    load("", [f"{key}={number}"])


def test_an_infinite_bound_and_an_empty_text_are_valid_values(empty: Path) -> None:
    run = load(empty, ["algorithm.kl_correction.bound=.inf", "tasks.path="])
    assert (run.algorithm.kl_correction.bound, run.tasks.path) == (float("inf"), "")


def test_the_hub_s_state_of_a_large_run_fits_the_default_message_limit(empty: Path) -> None:
    """128 problems with 12 rollouts of 4096 tokens in the four batches that a lag of 2 admits, 8 bytes per token."""
    run = load(empty, ["learner.problems_per_step=128", "rollout.max_new_tokens=4096"])
    assert run.state_mb == 192


def test_the_hub_s_state_includes_the_top_tokens_of_guided_rollouts(empty: Path) -> None:
    overrides = ["learner.problems_per_step=128", "rollout.max_new_tokens=4096"]
    overrides += ["algorithm.teacher=behaviour", "algorithm.teacher_temperature=1"]
    with pytest.raises(ConfigError, match="up to 1216 MB of completions"):  # 16 more tokens each in 4 of 12 rollouts
        load(empty, overrides)
    assert load(empty, [*overrides, "hub.max_message_mb=1216"]).algorithm.top_logprobs_num == 16
    grpo = [*overrides, "algorithm.objective=grpo"]  # without distillation the engine reports no top tokens
    assert (load(empty, grpo).state_mb, load(empty, grpo).algorithm.top_logprobs_num) == (192, 0)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: [1\n", ["run.yaml:2", "not YAML"]),
        ("[1, 2]\n", ["must hold sections with keys, got a list"]),
        (
            "steps: 3\noptim:\n  lr: 1\n  beta1: 0.5\n  lr: 2\n",
            ["run.yaml:5: lr occurs twice in its section; keep one of them"],
        ),
        ("steps: 3\nsteps: 3\n", ["run.yaml:2: steps occurs twice in its section; keep one of them"]),
        ("optim: {lrate: 1}\n", ["run.yaml", "optim.lrate"]),
    ],
)
def test_an_error_names_the_file_that_holds_it(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    for part in parts:
        assert part in str(caught.value)


def test_an_error_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: cannot be read"):
        load(tmp_path / "absent.yaml")


def test_plain_data_is_validated_like_a_file() -> None:
    plain = to_plain(Run())
    plain["optim"]["lr"] = -1.0
    with pytest.raises(ConfigError, match=r"optim\.lr must be > 0, got -1\.0"):
        from_plain(plain)


def test_sglang_samples_guided_rollouts_at_another_temperature_only_if_it_scores_none() -> None:
    """It scores given tokens only at temperature 1; Eq. 4 needs such scores, other objectives and targets do not."""
    keys = ["engine.kind=sglang", "rollout.temperature=0.7"]
    with pytest.raises(
        ConfigError, match=r"rollout\.temperature must be 1\.0 with .*objective=sgpo and .*target=reachable"
    ):
        load("", keys)
    for without in ("algorithm.target=all", "algorithm.objective=grpo"):
        assert load("", [*keys, without]).rollout.temperature == 0.7
