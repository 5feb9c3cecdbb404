#!/usr/bin/env bash
# Takes tables, figures and single results over from where experiments wrote them: collect.sh OUT
# Everything here but README.md is replaced: what OUT does not have goes, so that no old result stands beside new ones.
set -euo pipefail
out=$(realpath -- "${1:?collect.sh OUT}")
cd "$(dirname "$0")"
[ "$out" != "$(pwd -P)" ] || { echo "$out: is where this script collects; name the experiments' OUT" >&2; exit 1; }
compgen -G "$out/results/*.json" >/dev/null || { echo "$out: has no results/*.json; nothing was changed" >&2; exit 1; }
for name in methods warm density long staleness staleness-warm ablations around; do
    rm -rf "$name"
    [ -f "$out/$name/README.md" ] || continue
    mkdir "$name"
    cp "$out/$name/README.md" "$name/"
    for figure in "$out/$name"/*.svg; do [ ! -f "$figure" ] || cp "$figure" "$name/"; done
done
rm -rf results bases
mkdir results bases
cp "$out"/results/*.json results/
for base in "$out"/bases/*/base.json; do
    [ ! -f "$base" ] || cp "$base" "bases/$(basename "$(dirname "$base")").json"
done
