"""The learner's configuration is the hub's: what it leaves out is taken, what it sets must be the same."""

from pathlib import Path

import pytest

from sgpo_async.config import Run, agreed, given_keys, load, to_plain
from sgpo_async.errors import ConfigError

HUB = ("rollout.autonomous=6", "learner.problems_per_step=16", "steps=50", "optim.lr=3e-4", "hub.max_lag=4")


def agree(*arguments: str, hub: tuple[str, ...] = HUB) -> Run:
    return agreed(load("", arguments), given_keys("", arguments), to_plain(load("", hub)))


def test_keys_that_the_learner_leaves_out_are_the_hubs() -> None:
    assert agree() == load("", HUB)


def test_the_same_values_may_be_written_differently() -> None:
    assert agree("optim.lr=0.0003", "steps=50", "hub.max_lag=4", "rollout.temperature=1") == load("", HUB)


@pytest.mark.parametrize(
    "private",
    [
        "out=/elsewhere",
        "hub.address=tcp://127.0.0.1:0",
        "hub.keys=/secret",
        "hub.journal=false",
        "hub.dashboard=127.0.0.1:1",
        "learner.row_tokens=512",
        "learner.precision=float32",
        "learner.resume=true",
        "learner.checkpoint_every=3",
        "local.ranks=7",
        "sft.epochs=3",
    ],
)
def test_keys_of_one_process_are_its_own(private: str) -> None:
    assert agree(private) == load("", (*HUB, private))
    assert agree(hub=(*HUB, private)) == load("", HUB), "the hub's do not concern the learner"


@pytest.mark.parametrize("key", ["model.path", "tasks.path"])
def test_a_file_may_be_elsewhere_on_another_machine(key: str) -> None:
    there, here = ((*HUB, "tasks={source: file, path: x}", f"{key}=/{place}/file") for place in ("there", "here"))
    assert agree(hub=there) == load("", there)
    assert agree(*here, hub=there) == load("", here)


def test_every_difference_is_named_in_one_line() -> None:
    arguments = ("rollout.autonomous=4", "learner.problems_per_step=8", "steps=12", "rollout.temperature=0.5")
    with pytest.raises(ConfigError) as failure:
        agree(*arguments, "hub.max_lag=0", "learner.row_tokens=512")
    assert str(failure.value) == (
        "hub.max_lag must be 4 as in the hub's configuration, got 0; "
        "learner.problems_per_step must be 16 as in the hub's configuration, got 8; "
        "rollout.autonomous must be 6 as in the hub's configuration, got 4; "
        "rollout.temperature must be 1.0 as in the hub's configuration, got 0.5; "
        "steps must be 50 as in the hub's configuration, got 12; "
        "start learner and hub with the same configuration"
    )


@pytest.mark.parametrize(
    "key",
    ["seed=1", "name=other", "tasks.held_out=3", "model.dtype=bfloat16", "algorithm.alpha0=2", "learner.lora.rank=4"],
)
def test_a_key_of_any_section_must_be_the_same(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key.partition('=')[0]} must be .* as in the hub's configuration, got "):
        agree(key)


def test_benchmarks_are_the_hubs(tmp_path: Path) -> None:
    """A name may contain dots, as a key path does."""
    file = tmp_path / "run.yaml"
    file.write_text("evaluation: {benchmarks: {math.500: {path: a.jsonl}}}\n")
    hub = load(file)
    assert agreed(load(""), frozenset(), to_plain(hub)) == hub
    assert agreed(hub, given_keys(file), to_plain(hub)) == hub
    with pytest.raises(ConfigError, match=r"math.500.path must be None as in the hub's configuration, got 'a.jsonl'"):
        agreed(hub, given_keys(file), to_plain(load("")))


def test_the_keys_that_files_and_arguments_set(tmp_path: Path) -> None:
    for name, text in {"run": "steps: 3\noptim: {lr: 1e-4}\n", "more": "optim: {beta1: 0.8}\n"}.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    given = given_keys(tmp_path / "run.yaml", [str(tmp_path / "more.yaml"), "hub.max_lag=3", "optim.lr=2e-4"])
    assert given == {"steps", "optim.lr", "optim.beta1", "hub.max_lag"}
