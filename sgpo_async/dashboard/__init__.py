"""A run in a browser, read-only: `sgpo-async dashboard` (docs/dashboard.md).

hub, runs/NAME ─▶ observer ─▶ RunView ─┬▶ report.advisories ─┐
                                       ├▶ sections ──────────┴▶ server ─▶ browser
                                       └▶ prometheus ──▶ server ─▶ Prometheus
"""
