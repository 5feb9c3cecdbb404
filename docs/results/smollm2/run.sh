#!/usr/bin/env bash
# Makes the results in this folder anew: docs/results/smollm2/run.sh [model|warm-up|run|evaluate|sglang|collect|all]
set -euo pipefail
cd "$(dirname "$0")/../../.."
export OMP_NUM_THREADS=1
BIN=${BIN:-.venv/bin}

evaluate() { # NAME MODEL: held-out problems at the temperature of training, without and with strategies
    for guided in "" --guided; do
        "$BIN/python" launch/evaluate.py configs/smollm2.yaml --model "$2" $guided --out "runs/smollm2-evaluations/$1$guided" \
            --temperature 1 --top-p 1 --samples 4 --texts
    done
}

case "${1:-all}" in
model)
    "$BIN/python" examples/smollm2.py runs/smollm2-base
    "$BIN/python" examples/word_problems.py runs/word-problems
    ;;
warm-up) "$BIN/torchrun" --standalone --nproc-per-node 1 launch/sft.py configs/smollm2.yaml name=smollm2-sft ;;
run) "$BIN/python" launch/local.py configs/smollm2.yaml model.path=runs/smollm2-sft/warmup ;;
evaluate)
    evaluate base runs/smollm2-base
    evaluate warm-up runs/smollm2-sft/warmup
    evaluate trained runs/smollm2/policy
    ;;
sglang) "$BIN/python" launch/local.py configs/smollm2.yaml configs/smollm2-sglang.yaml model.path=runs/smollm2-sft/warmup ;;
collect) "$BIN/python" docs/results/smollm2/collect.py ;;
all) for which in model warm-up run evaluate sglang collect; do "$0" "$which"; done ;;
*) echo "error: $1 is none of model, warm-up, run, evaluate, sglang, collect, all" >&2; exit 2 ;;
esac
