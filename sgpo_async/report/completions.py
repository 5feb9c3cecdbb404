"""The section of the page with completions: the first, the middle and the last group of samples.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sgpo_async.report.numbers import number
from sgpo_async.report.texts import Run, notes_of, printable, runs_of, solved, strength, versions_of

CHARS = 1500  # of each completion
SHADES = 20  # CSS classes k1 to k20 of a token's shading

CAPTION = (
    "Groups of the first, a middle and the last kept step. The shading of a distilled completion shows the divergence "
    "of each token between the guided and the unguided distribution (Eq. 3); hover over a token for its value."
)


def completions(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML of the section, empty without samples."""
    if not samples:
        return ""
    chosen = [samples[i] for i in sorted({0, len(samples) // 2, len(samples) - 1})]
    groups = "".join(group(sample, shown=number == len(chosen) - 1) for number, sample in enumerate(chosen))
    more = "<p>All of them: <code>sgpo-async samples RUN</code></p>"
    return f'<section class="samples"><h2>Completions</h2><p>{CAPTION}</p>{groups}{more}</section>'


def group(sample: Mapping[str, Any], *, shown: bool) -> str:
    """One group; `shown`: unfolded from the start."""
    (alone, autonomous), (helped, guided) = solved(sample), solved(sample, guided=True)
    facts = [f"alone {alone} of {autonomous} correct"]
    facts += [f"with the strategy {helped} of {guided}"] if guided else []
    facts += [f"alpha {number(sample.get('alpha'))}"]
    head = f"<summary><b>step {sample['step']}</b> {escape(', '.join(facts))}</summary>"
    about = [(name, sample[name]) for name in ("problem", "strategy", "answer") if sample.get(name) is not None]
    rows = "".join(f"<tr><td>{name}</td><td><q>{_text(str(value))}</q></td></tr>" for name, value in about)
    body = "".join(_rollouts(sample["rollouts"], guided=guided) for guided in (False, True))
    name = _text(f"{sample['step']}-{sample.get('task')}")
    tables = f"<table>{rows}</table><table>{body}</table>"
    return f'<details{" open" * shown} data-name="{name}">{head}{tables}</details>'


def _rollouts(rollouts: Sequence[Mapping[str, Any]], *, guided: bool) -> str:
    own = [_rollout(rollout) for rollout in rollouts if rollout["guided"] == guided]
    name = "with the strategy" if guided else "alone"
    head = f'<tr class="head"><td></td><td class="n">version</td><td class="n">tokens</td><td>{name}</td></tr>'
    return head + "".join(own) if own else ""


def _rollout(rollout: Mapping[str, Any]) -> str:
    right = rollout["correct"]
    mark = f'<td class="{"right" if right else "wrong"}">{"✓" if right else "✗"}</td>'
    notes = ["distilled"] * ("kl" in rollout) + [notes_of(rollout)]
    note = f"<i>{escape(', '.join(filter(None, notes)))}</i>" if any(notes) else ""
    text = "".join(_run(run) for run in runs_of(rollout, chars=CHARS))
    figures = f'<td class="n">{versions_of(rollout)}</td><td class="n">{rollout["tokens"]}</td>'
    return f"<tr>{mark}{figures}<td><q>{text}</q>{note}</td></tr>"


def _run(run: Run) -> str:
    text, kl = run
    shade = round(SHADES * strength(kl))
    if kl is None or not shade:
        return _text(text)
    return f'<mark class="k{shade}" title="{number(kl)} nats">{_text(text)}</mark>'


def _text(text: str) -> str:
    return escape(printable(text))
