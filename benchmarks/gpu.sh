#!/usr/bin/env bash
# All that is checked and measured on a GPU, in an order that keeps the most if time runs out.
#     benchmarks/gpu.sh OUT [PART ...]
# Parts: kernels (against fp64), engine (graphs against eager calls), parity (recorded numbers), tune,
# step, ops, forward, training (steps of stage 2 against the authors'), service (over HTTP, under
# load, with killed workers), throughput; of the last one also by themselves: none, autoguidance,
# cfg (XL-256 by guidance), start, ablation, xl512, deterministic, compiled. Without a part all of them.
#     UPSTREAM=DIR     a clone of bytetriper/RAE, to compare with
#     CHECKPOINTS=DIR  where random weights stay between runs, 6 GB a model
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?where the results go}
shift
python=${PYTHON:-.venv/bin/python}
upstream=(${UPSTREAM:+--upstream "$UPSTREAM"})
checkpoints=${CHECKPOINTS:-${TMPDIR:-/tmp}/rae-benchmarks}
mkdir -p "$out" .typecheck/rae
for room in server kernels models training; do ln -sfn "../../$room" ".typecheck/rae/$room"; done
export PYTHONPATH="$PWD/.typecheck${PYTHONPATH:+:$PYTHONPATH}"
failed=0
run() {
    local name=$1
    shift
    echo "== $name"
    timeout "${LIMIT:-240}" "$@" >"$out/$name.log" 2>&1 || { failed=1; echo "   failed: $?"; }
    tail -n 3 "$out/$name.log"
}
# Seconds, a name, and flags. What is written so far stays when the time is up.
throughput() {
    local budget=$1 name=$2
    shift 2
    LIMIT=$((budget + 70)) run "$name" "$python" benchmarks/throughput.py --device cuda \
        --budget-s "$budget" --checkpoints "$checkpoints" --out "$out/$name" "${upstream[@]}" "$@"
}
# Seconds, a name, a size, and flags.
train_step() {
    LIMIT=$(($1 + 60)) run "train-step-$2" "$python" benchmarks/train_step.py "${upstream[@]}" \
        --device cuda --budget-s "$1" --model "DiTDH-$3-256" --steps 10 --warm-up 3 \
        --precision tf32 --precision bf16 --json "$out/train-step-$2.json" "${@:4}"
}
part() {
    case $1 in
    kernels) run kernels "$python" -m pytest -p no:cacheprovider tests/kernels -x -q ;;
    engine) run engine "$python" -m pytest -p no:cacheprovider tests/server/test_cuda_graphs.py -q ;;
    parity) run parity "$python" benchmarks/parity.py tests/golden --device cuda --kernels triton ;;
    tune) run tune "$python" -m rae.server tune --out "$out/tuning.json" ;;
    step) run step "$python" benchmarks/step.py ;;
    ops) run ops "$python" benchmarks/ops.py --device cuda --out "$out/ops" ;;
    forward)
        [[ -z ${UPSTREAM:-} ]] || run forward "$python" benchmarks/forward.py "${upstream[@]}" \
            --device cuda --batch 32 --json "$out/forward.json"
        ;;
    training)
        [[ -n ${UPSTREAM:-} ]] || return 0
        run train-parity "$python" benchmarks/train_parity.py "${upstream[@]}" --device cuda \
            --json "$out/train-parity.json"
        train_step 480 XL XL --batch 64 --batch 32
        train_step 360 S S --batch 128 --batch 64 --batch 256
        train_step 180 trials S --batch 128 --rounds 1 --variant "ours whole" \
            --variant "ours compiled aligned" --variant "ours whole aligned"
        ;;
    service)
        LIMIT=300 run over-http "$python" benchmarks/over_http.py --device cuda --model DiTDH-XL-256 \
            --batch 32 --checkpoints "$checkpoints" --json "$out/over-http.json"
        LIMIT=300 run load "$python" benchmarks/load.py --model "$checkpoints/DiTDH-XL-256" \
            --seconds 30 --json "$out/load.json"
        LIMIT=300 run kills "$python" benchmarks/kills.py --model "$checkpoints/DiTDH-XL-256" \
            --kills 3 --json "$out/kills.json"
        ;;
    throughput) for each in none autoguidance start ablation cfg xl512 deterministic compiled; do part $each; done ;;
    none | cfg) throughput 200 "$1" --guidance "$1" --part sweep ;;
    autoguidance) throughput 300 "$1" --part sweep ;;
    start) throughput 300 start --part start ;;
    ablation) throughput 400 ablation --part ablation --batch 32 ;;
    xl512) throughput 300 xl512 --model DiTDH-XL-512 --part sweep --batch 8 --batch 1 --batch 32 ;;
    deterministic) throughput 300 deterministic --guidance none --part deterministic ;;
    compiled) throughput 500 compiled --guidance none --part compiled --batch 32 --batch 1 ;;
    *) echo "gpu.sh: no part $1" >&2 && exit 2 ;;
    esac
}
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
for each in "${@:-kernels engine parity tune step ops forward training service throughput}"; do
    # shellcheck disable=SC2086 # the default is a list
    for name in $each; do part "$name"; done
done
exit $failed
