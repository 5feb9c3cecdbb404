"""/metrics in Prometheus' text format, and the Grafana file that draws it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from dashboard_support import HOSTILE, ask, get, observer_of, trained_status
from prometheus_client.parser import text_string_to_metric_families
from synthetic_metrics import synthetic_lines, write_lines

from sgpo_async.dashboard.observer import Observer
from sgpo_async.dashboard.prometheus import ACTORS, exposition

GRAFANA = Path(__file__).parents[2] / "configs" / "grafana" / "sgpo_async.json"

Found = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(observer: Observer) -> tuple[Found, dict[str, Any]]:
    """The samples of an exposition by name and labels, and its families by name."""
    families = list(text_string_to_metric_families(exposition(observer.view()).decode()))
    samples = [sample for family in families for sample in family.samples]
    found = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}
    assert len(found) == len(samples), "no sample comes twice"
    return found, {family.name: family for family in families}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_lines(tmp_path, synthetic_lines(40))
    return tmp_path


def test_the_values_are_those_of_hub_and_learner(folder: Path) -> None:
    status = trained_status() | {"engine_waits": {"weights": 0.25}, "uptime_s": 12.5, "joined": 3}
    found, _ = parsed(observer_of(folder, status))
    expected = {
        ("up", ()): 1,
        ("state", (("state", "training"),)): 1,
        ("state", (("state", "stalled"),)): 0,
        ("step", ()): 40,
        ("steps", ()): 5,
        ("weight_version", ()): 1,
        ("loss", ()): synthetic_lines(40)[-1]["loss"],
        ("pass_ratio", (("mode", "autonomous"), ("problems", "training"))): status["pass_auto"],
        ("tokens_generated_total", ()): status["tokens_generated"],
        ("actors_joined_total", ()): 3,
        ("uptime_seconds", ()): 12.5,
        ("trainer_wait_ratio", (("cause", "publication"),)): 0.01,
        ("engine_wait_ratio", (("cause", "weights"),)): 0.25,
        ("rollouts_dispatched_total", ()): status["ledger"]["rollouts"]["dispatched"],
        ("tasks_trained_total", ()): status["ledger"]["trained"],
        ("actors", ()): 1,
        ("actor_weight_version", (("actor", "a"),)): 0,
        ("canary_alarms_total", (("kind", "stuck"),)): 0,
    }
    assert {key: found.get((f"sgpo_async_{key[0]}", key[1])) for key in expected} == expected


def test_every_metric_has_a_help_a_type_and_a_prefix(folder: Path) -> None:
    _, families = parsed(observer_of(folder, trained_status()))
    assert len(families) >= 50
    for name, family in families.items():
        assert (
            name.startswith("sgpo_async_")
            and family.documentation.endswith(".")
            and family.type in ("gauge", "counter")
        )
        assert (family.type == "counter") == all(
            sample.name.endswith("_total") for sample in family.samples
        ) or not family.samples
    _, nothing = parsed(observer_of())
    assert set(nothing) == set(families), "the names do not depend on what is known"


def test_what_is_not_known_has_no_sample(tmp_path: Path) -> None:
    found, _ = parsed(observer_of(tmp_path))
    assert found[("sgpo_async_up", ())] == 0
    assert not any(
        name in ("sgpo_async_loss", "sgpo_async_status_age_seconds", "sgpo_async_actors") for name, _ in found
    )


def test_the_labels_from_outside_are_bounded_and_escaped(folder: Path) -> None:
    status = trained_status()
    actor = status["actors"][0]
    names = [HOSTILE, f"{HOSTILE}\n", 'quote" \\ back', "a", "a", "n" * 500, *(f"actor-{n}" for n in range(1000))]
    status["actors"] = [actor | {"name": name} for name in names]
    status["ledger"]["dropped"] = {f"reason {n}": 1 for n in range(1000)}
    found, families = parsed(observer_of(folder, status))
    actors = families["sgpo_async_actor_leases"].samples
    assert ACTORS - 10 < len(actors) <= ACTORS
    assert all(len(sample.labels["actor"]) <= 400 and sample.labels["actor"].isprintable() for sample in actors)
    assert len(families["sgpo_async_tasks_dropped"].samples) <= 32
    assert found[("sgpo_async_actors", ())] == len(names)


def test_the_content_type_is_the_text_formats(folder: Path) -> None:
    ((status, text, headers),) = ask(observer_of(folder), get("/metrics"))
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert text.startswith("# HELP sgpo_async_up ")


def test_every_expression_of_the_grafana_file_names_a_metric(folder: Path) -> None:
    _, families = parsed(observer_of(folder, trained_status()))
    exported = {f"{name}_total" if family.type == "counter" else name for name, family in families.items()}
    dashboard = json.loads(GRAFANA.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    for expression in expressions:
        names = re.findall(r"sgpo_async_\w+", expression)
        assert names and set(names) <= exported, expression
        counters = [name for name in names if name.endswith("_total")]
        assert "rate(" not in expression or counters, f"{expression}: only counters have rates"
    drawn = {name for expression in expressions for name in re.findall(r"sgpo_async_\w+", expression)}
    assert len(drawn) > 30 and len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
