#!/usr/bin/env bash
# Makes the results in this folder anew: docs/results/smollm2/run.sh [model|warm-up|run|evaluate|sglang|replay|seeds|examine|family|collect|all]
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

examine() { # NAME MODEL [key=value ...]: held-out problems without strategies, 16 samples of each
    "$BIN/python" launch/evaluate.py configs/smollm2.yaml "${@:3}" --model "$2" --out "runs/smollm2-examined/$1" \
        --temperature 1 --top-p 1 --samples 16
}

ANCHORED=(algorithm.teacher_temperature=1 algorithm.distil_skip=0) # the default when these results were made
WITH_SGLANG=(engine.kind=sglang engine.device=cpu engine.slots=32 engine.sglang.servers=1)

case "${1:-all}" in
model)
    "$BIN/python" examples/smollm2.py runs/smollm2-base
    "$BIN/python" examples/word_problems.py runs/word-problems
    ;;
warm-up) "$BIN/torchrun" --standalone --nproc-per-node 1 launch/sft.py configs/smollm2.yaml name=smollm2-sft ;;
run) "$BIN/python" launch/local.py configs/smollm2.yaml "${ANCHORED[@]}" model.path=runs/smollm2-sft/warmup ;;
evaluate)
    evaluate base runs/smollm2-base
    evaluate warm-up runs/smollm2-sft/warmup
    evaluate trained runs/smollm2/policy
    ;;
sglang) # the third is the first again: SGLang's samples on a CPU differ from run to run
    for run in "sglang 3e-5 0" "sglang-1e-5 1e-5 0" "sglang-again 3e-5 0" "sglang-seed-1 3e-5 1"; do
        read -r name rate seed <<<"$run"
        "$BIN/python" launch/local.py configs/smollm2.yaml configs/smollm2-sglang.yaml "${ANCHORED[@]}" model.path=runs/smollm2-sft/warmup \
            name="smollm2-$name" optim.lr="$rate" seed="$seed" learner.samples=6
    done
    ;;
replay) "$BIN/python" docs/results/smollm2/replay.py runs/smollm2-sglang-seed-1 | tee docs/results/smollm2/replay.txt ;;
seeds) # four steps, as with SGLang, by the embedded engine
    "$BIN/python" launch/local.py configs/smollm2.yaml "${ANCHORED[@]}" model.path=runs/smollm2-sft/warmup steps=4 engine.slots=16 \
        evaluation.every=100 name=smollm2-embedded-16-slots
    for seed in 0 1 2; do
        for rate in 3e-5 1e-5; do
            [ $rate-$seed = 1e-5-0 ] && continue
            "$BIN/python" launch/local.py configs/smollm2.yaml "${ANCHORED[@]}" model.path=runs/smollm2-sft/warmup steps=4 seed=$seed \
                optim.lr=$rate evaluation.every=100 name=smollm2-embedded-$rate-seed-$seed
        done
    done
    ;;
examine)
    examine warm-up runs/smollm2-sft/warmup
    examine warm-up-by-sglang runs/smollm2-sft/warmup "${WITH_SGLANG[@]}"
    examine sglang-by-sglang runs/smollm2-sglang/policy "${WITH_SGLANG[@]}"
    for run in sglang sglang-1e-5 sglang-again sglang-seed-1 embedded-16-slots embedded-3e-5-seed-{0,1,2} embedded-1e-5-seed-{1,2}; do
        examine $run runs/smollm2-$run/policy
    done
    ;;
family) # experiment (n): a warm-up that follows strategies, then the trials
    "$BIN/python" examples/word_problems.py runs/word-problems-follower --warm-up 176
    "$BIN/torchrun" --standalone --nproc-per-node 1 launch/sft.py configs/smollm2.yaml name=smollm2-follower \
        sft.path=runs/word-problems-follower/warm-up.jsonl sft.guided_share=0.9 sft.batch=16 sft.lr=5e-5
    "$BIN/sgpo-async" experiment configs/experiments/smollm2.yaml --out runs/experiments
    ;;
collect) "$BIN/python" docs/results/smollm2/collect.py ;;
all) for which in model warm-up run evaluate sglang replay seeds examine family collect; do "$0" "$which"; done ;;
*) echo "error: $1 is none of model, warm-up, run, evaluate, sglang, replay, seeds, examine, family, collect, all" >&2; exit 2 ;;
esac
