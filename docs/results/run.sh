#!/usr/bin/env bash
# Makes the runs of docs/results/README.md anew, one after another, and keeps their summaries and configurations.
set -euo pipefail
cd "$(dirname "$0")/../.."

run() { # NAME CONFIG [key=value ...]
    local name=$1
    .venv/bin/python launch/local.py "$2" name="$name" "${@:3}"
    mkdir -p "docs/results/$name"
    cp "runs/$name/summary.json" "runs/$name/config.yaml" "docs/results/$name/"
}

corrections() { # MODE, for both terms of the loss; the KL has a correction only without a sharper teacher, so none has it
    run "demo-$1" configs/demo.yaml algorithm.teacher_temperature=1 \
        "algorithm.grpo_correction.mode=$1" "algorithm.kl_correction.mode=$1"
}

case "${1:-all}" in
demo) run demo configs/demo.yaml ;;
lag8) run demo-lag8 configs/demo.yaml hub.max_lag=8 ;;
sync) run demo-sync configs/demo-sync.yaml ;;
paper) run demo-paper configs/demo-paper.yaml ;;
none | token | prefix) corrections "$1" ;;
sglang) run demo-sglang configs/demo-sglang.yaml ;;
all) for which in demo lag8 sync paper none token prefix sglang; do "$0" "$which"; done ;;
*) echo "error: $1 is none of demo, lag8, sync, paper, none, token, prefix, sglang, all" >&2; exit 2 ;;
esac
