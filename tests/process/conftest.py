"""A failed test of a run shows what the processes of the run have printed; its files may be out of reach by then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from run_support import RealRun, last_outputs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """Add the ends of all outputs to the report."""
    report = yield
    if report.failed:
        for run in filter(lambda value: isinstance(value, RealRun), getattr(item, "funcargs", {}).values()):
            for name, tail in last_outputs(run.config.parent):
                report.sections.append((f"output of {name}", tail))
    return report
