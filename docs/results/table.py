"""The table in README.md, from the summaries beside this file: `python docs/results/table.py`."""

import json
from pathlib import Path

HERE = Path(__file__).parent
COLUMNS = (
    "run",
    "alone, first → last",
    "guided, last",
    "lag mean (max)",
    "wall",
    "tokens/s",
    "trainer idle",
    "engine idle",
    "rollouts: dispatched = trained + dropped",
)


def row(folder: Path) -> tuple[str, ...]:
    summary = json.loads((folder / "summary.json").read_text())
    ledger = summary["ledger"]["rollouts"]
    assert ledger["in_flight"] == ledger["buffered"] == 0
    minutes, seconds = divmod(round(summary["wall_s"]), 60)
    return (
        folder.name,
        f"{summary['pass_auto_first']:.1%} → {summary['pass_auto_last']:.1%}",
        f"{summary['pass_guided_last']:.1%}",
        f"{summary['lag_mean']:.2f} ({summary['lag_max']})",
        f"{minutes}:{seconds:02}",
        f"{summary['tokens_generated'] / summary['wall_s']:,.0f}",
        f"{summary['learner_idle']:.0%}",
        f"{summary['engine_idle']:.0%}",
        f"{ledger['dispatched']} = {ledger['trained']} + {sum(ledger['dropped'].values())}",
    )


if __name__ == "__main__":
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(path.parent) for path in sorted(HERE.glob("*/summary.json")))]
    print("\n".join(f"| {' | '.join(cells)} |" for cells in rows))
