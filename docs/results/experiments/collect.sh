#!/usr/bin/env bash
# Takes tables, figures and single results over from where experiments wrote them: collect.sh OUT
set -euo pipefail
cd "$(dirname "$0")"
for name in methods density long staleness ablations; do
    [ -f "$1/$name/README.md" ] || continue
    mkdir -p "$name"
    cp "$1/$name/README.md" "$1/$name"/*.svg "$name/"
done
mkdir -p results bases
cp "$1"/results/*.json results/
for base in "$1"/bases/*/base.json; do cp "$base" "bases/$(basename "$(dirname "$base")").json"; done
