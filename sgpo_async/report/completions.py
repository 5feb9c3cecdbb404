"""Completions of samples.jsonl in HTML: some groups for the page of a run, or a page of chosen groups.

The autonomous completions of a group stand beside the guided ones, so that one sees what a strategy changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

from sgpo_async.logs import printable
from sgpo_async.report.document import document
from sgpo_async.report.numbers import number
from sgpo_async.report.style import SHADES
from sgpo_async.report.texts import Run, context_of, notes_of, runs_of, solved, strength, versions_of

CHARS = 1500  # of each completion

SHADING = (
    "The shading of a distilled completion shows the divergence of each token between the distributions with and "
    "without the context (Eq. 3); hover over a token for its value."
)
MASKED = " Tokens that are struck through have more than {} nats: the mask of Eq. 5 removes them from the loss."


def completions(samples: Sequence[Mapping[str, Any]], *, bound: float = math.inf) -> str:
    """Return the HTML of the section, empty without samples; `bound`: see `mask_bound`."""
    if not samples:
        return ""
    chosen = [samples[i] for i in sorted({0, len(samples) // 2, len(samples) - 1})]
    groups = "".join(
        group(sample, shown=number == len(chosen) - 1, bound=bound) for number, sample in enumerate(chosen)
    )
    caption = f"Groups of the first, a middle and the last kept step. {legend(bound)}"
    more = "<p>All of them: <code>sgpo-async samples RUN --last 100 --html FILE</code></p>"
    return f'<section class="samples"><h2>Completions</h2><p>{caption}</p>{groups}{more}</section>'


def samples_page(name: str, samples: Sequence[Mapping[str, Any]], *, bound: float, chars: int) -> str:
    """A page of these groups, all unfolded, with at most `chars` characters of each completion (0: all)."""
    groups = "".join(group(sample, shown=True, bound=bound, chars=chars) for sample in samples)
    section = f'<section class="samples"><p>{legend(bound)}</p>{groups}</section>'
    return document(f"Completions of {name}", [f"<header><h1>{escape(name)}</h1></header>", section])


def mask_bound(config: Mapping[str, Any]) -> float:
    """The divergence in nats above which the mask of Eq. 5 removes a token in a run of this configuration."""
    algorithm = config.get("algorithm") or {}
    return float(algorithm.get("delta", 1.0)) if algorithm.get("limiter") == "mask" else math.inf


def legend(bound: float) -> str:
    """What shading and strokes mean."""
    return SHADING + (MASKED.format(f"{bound:g}") if bound < math.inf else "")


def group(sample: Mapping[str, Any], *, shown: bool, bound: float = math.inf, chars: int = CHARS) -> str:
    """One group; `shown`: unfolded from the start."""
    (alone, autonomous), (helped, guided) = solved(sample), solved(sample, guided=True)
    facts = [f"alone {alone} of {autonomous} correct"]
    context = context_of(sample)
    facts += [f"with the {context} {helped} of {guided}"] if guided else []
    facts += [f"alpha {number(sample.get('alpha'))}"]
    head = f"<summary><b>step {sample['step']}</b> {escape(', '.join(facts))}</summary>"
    names = {"problem": "problem", "strategy": context, "answer": "answer"}
    about = [(name, sample[key]) for key, name in names.items() if sample.get(key) is not None]
    rows = "".join(f"<tr><td>{_text(name)}</td><td><q>{_text(str(value))}</q></td></tr>" for name, value in about)
    show = partial(_run, bound=bound)
    rollouts = sample["rollouts"]
    sides = _rollouts([one for one in rollouts if not one["guided"]], show, heading="alone", chars=chars)
    sides += _rollouts([one for one in rollouts if one["guided"]], show, heading=f"with the {context}", chars=chars)
    name = _text(f"{sample['step']}-{sample.get('task')}")
    tables = f'<table>{rows}</table><div class="sides">{sides}</div>'
    return f'<details{" open" * shown} data-name="{name}">{head}{tables}</details>'


def _rollouts(rollouts: Sequence[Mapping[str, Any]], show: Callable[[Run], str], *, heading: str, chars: int) -> str:
    own = "".join(_rollout(rollout, show, chars) for rollout in rollouts)
    columns = f'<td class="n">version</td><td class="n">tokens</td><td>{_text(heading)}</td>'
    return f'<table><tr class="head"><td></td>{columns}</tr>{own}</table>' if own else ""


def _rollout(rollout: Mapping[str, Any], show: Callable[[Run], str], chars: int) -> str:
    right = rollout["correct"]
    mark = f'<td class="{"right" if right else "wrong"}">{"✓" if right else "✗"}</td>'
    notes = ["distilled"] * ("kl" in rollout) + [notes_of(rollout)]
    note = f"<i>{escape(', '.join(filter(None, notes)))}</i>" if any(notes) else ""
    text = "".join(show(run) for run in runs_of(rollout, chars=chars))
    figures = f'<td class="n">{versions_of(rollout)}</td><td class="n">{rollout["tokens"]}</td>'
    return f"<tr>{mark}{figures}<td><q>{text}</q>{note}</td></tr>"


def _run(run: Run, *, bound: float) -> str:
    text, kl = run
    shade = round(SHADES * strength(kl))
    if kl is None or not shade:
        return _text(text)
    masked = " masked" * (kl > bound)
    return f'<mark class="k{shade}{masked}" title="{number(kl)} nats">{_text(text)}</mark>'


def _text(text: str) -> str:
    return escape(printable(text))
