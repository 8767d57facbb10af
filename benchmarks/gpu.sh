#!/usr/bin/env bash
# All that is checked and measured on a GPU, in an order that keeps the most if time runs out.
#     benchmarks/gpu.sh OUT [PART ...]
# first   what is right, and the ceilings:
#   kernels (against fp64), engine (graphs against eager calls), parity (recorded numbers in fp32,
#   tf32 and bf16), tune (writes the table of this GPU, which all parts after it take), ops
# second  XL-256 against the authors' eager code:
#   none, autoguidance, profile (of a step, by kernel), http (over HTTP and alone)
# third   compiled (the authors' code by torch.compile), step (by choice of kernels)
# fourth  training (steps of stage 2)
# fifth   cfg, ablation;  sixth: xl512, start (cold and warm), deterministic
# last    load (Poisson arrivals), kills (of workers), forward;  then ops-compile
# Each of these groups takes about ten minutes on an H200, predicted; without a PART all of them.
#     BUDGET=SECONDS   no part starts later, and the last is ended then; what it wrote stays
#     UPSTREAM=DIR     a clone of bytetriper/RAE, to compare with
#     COMMIT=NAME      what a copy without .git is of, for the results
#     CHECKPOINTS=DIR  where random weights stay between runs, 6 GB a model
#     DEVICE=cpu       a rehearsal where there is no GPU: the same commands on small models
set -uo pipefail
cd "$(dirname "$0")/.."
declare -A groups=(
    [first]="kernels engine parity tune ops"
    [second]="none autoguidance profile http"
    [third]="compiled step"
    [fourth]=training
    [fifth]="cfg ablation"
    [sixth]="xl512 start deterministic"
    [last]="load kills forward"
)
refuse() {
    echo "gpu.sh: $1" >&2
    exit 2
}
(($#)) || refuse "where do the results go? benchmarks/gpu.sh OUT [PART ...]"
out=$1
shift
all=(first second third fourth fifth sixth last ops-compile)
(($#)) || set -- "${all[@]}"
known="${all[*]}" parts=()
for each in "${all[@]}"; do known+=" ${groups[$each]:-}"; done
for each in "$@"; do
    [[ " $known " == *" $each "* ]] || refuse "no part $each; known: $known"
    read -ra names <<<"${groups[$each]:-$each}"
    parts+=("${names[@]}")
done
device=${DEVICE:-cuda}
[[ $device == cuda || $device == cpu ]] || refuse "DEVICE=$device is not cuda or cpu"
[[ -d ${UPSTREAM:-.} ]] || refuse "UPSTREAM=$UPSTREAM is no folder"
python=${PYTHON:-.venv/bin/python}
budget=${BUDGET:-86400}
upstream=(${UPSTREAM:+--upstream "$UPSTREAM"})
checkpoints=${CHECKPOINTS:-${TMPDIR:-/tmp}/rae-benchmarks}
xl=DiTDH-XL-256 xl512=DiTDH-XL-512 small=() http=(--steps 50 --batch 32) profile=() step=()
forward=(--batch 32) workers=1
if [[ $device == cpu ]]; then
    xl=digits xl512=digits small=(--steps 4 --turns 1 --batch 2) profile=(--batch 2)
    http=(--steps 4 --batch 2 --turns 1)
    step=(--model DiTDH-S-256 --batch 1 --turns 1 --kernels auto --kernels reference)
    forward=(--model DiTDH-S-256 --batch 1 --turns 1)
fi
mkdir -p "$out" .typecheck/rae
for room in server kernels models training; do ln -sfn "../../$room" ".typecheck/rae/$room"; done
export PYTHONPATH="$PWD/.typecheck${PYTHONPATH:+:$PYTHONPATH}"
failed=0

# Seconds at most, a name, and a command.
run() {
    local limit=$1 name=$2 left=$((budget - SECONDS)) started=$SECONDS
    shift 2
    ((left < limit)) && limit=$left
    if ((limit < 10)); then
        echo "== $name: no time left" && failed=1
        return
    fi
    echo "== $name"
    local code=0
    timeout --kill-after=15 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$? failed=1
    tail -n 3 "$out/$name.log"
    echo "   $((SECONDS - started)) s, exit code $code"
}
tests() {
    # Other plugins of the machine's may warn, which is an error here.
    local plugins=(-p pytest_timeout -p no:cacheprovider)
    "$python" -c "import xdist" 2>/dev/null && plugins+=(-p xdist.plugin -n "$workers")
    PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 run "$1" "$2" \
        "$python" -P -m pytest "${plugins[@]}" -q "${@:3}"
}
# Seconds, a name, and flags. What is written so far stays when the time is up.
throughput() {
    local seconds=$1 name=$2 left=$((budget - SECONDS - 30))
    ((left < seconds)) && seconds=$((left > 1 ? left : 1))
    run $((seconds + 70)) "$name" "$python" benchmarks/throughput.py --device "$device" \
        --model "$xl" --budget-s "$seconds" --checkpoints "$checkpoints" --out "$out/$name" \
        "${upstream[@]}" "${@:3}" "${small[@]}"
}
# Seconds, a name, a size, and flags.
train_step() {
    local flags=(--steps 10 --warm-up 3 "${@:4}")
    [[ $device == cuda ]] || flags=(--batch 1 --steps 1 --warm-up 1 --rounds 1 --precision bf16)
    run $(($1 + 60)) "train-step-$2" "$python" benchmarks/train_step.py "${upstream[@]}" \
        --device "$device" --budget-s "$1" --model "DiTDH-$3-256" \
        --json "$out/train-step-$2.json" "${flags[@]}"
}
training() {
    [[ -n ${UPSTREAM:-} ]] || return 0
    run 240 train-parity "$python" benchmarks/train_parity.py "${upstream[@]}" --device "$device" \
        --json "$out/train-parity.json"
    train_step 360 S S --batch 128 --batch 64 --precision bf16 --precision tf32
    [[ $device == cuda ]] || return 0
    train_step 480 XL XL --batch 64 --rounds 1 --precision bf16 --precision tf32
    train_step 180 trials S --batch 128 --rounds 1 --precision bf16 --variant "ours whole" \
        --variant "ours compiled aligned" --variant "ours whole aligned"
}
parity() {
    local kernels=(--kernels triton) precisions=(fp32 tf32 bf16)
    [[ $device == cuda ]] || kernels=() precisions=(fp32 bf16)
    for each in "${precisions[@]}"; do
        run 240 "parity-$each" "$python" benchmarks/parity.py tests/golden --device "$device" \
            --precision "$each" "${kernels[@]}"
    done
}
tune() {
    [[ $device == cuda ]] || return 0
    run 400 tune "$python" -m rae.server tune
    # Also of the shapes that were measured before the time was up.
    find kernels/tuning -name "*.json" -newer "$out/nvidia-smi.txt" -exec cp {} "$out/" \;
}
ops() {
    local quick=()
    [[ $device == cuda ]] || quick=(--quick)
    run 560 "$1" "$python" benchmarks/ops.py --device "$device" --out "$out/$1" "${quick[@]}" "${@:2}"
}
# Seconds, a name and flags; a server of XL, whose weights other parts have written, or none yet.
served() {
    local flags=()
    # Their images have to be the same bytes alone and among others.
    [[ $device == cuda ]] && flags=(--model "$checkpoints/$xl" --serve=--deterministic
        --serve=--max-batch=16)
    [[ $device == cpu || -f $checkpoints/$xl/config.json ]] ||
        PYTHONPATH="benchmarks:$PYTHONPATH" run 120 weights "$python" -c "
import pathlib, subjects, torch
subjects.find_checkpoint('$xl', pathlib.Path('$checkpoints'), torch.device('$device'))"
    run "$1" "$2" "$python" "benchmarks/$2.py" "${flags[@]}" --json "$out/$2.json" "${@:3}"
}
part() {
    case $1 in
    kernels)
        if [[ $device == cuda ]]; then workers=8 tests 420 kernels tests/kernels; else
            tests 300 kernels tests/kernels/test_adaln.py; fi
        ;;
    engine) workers=3 tests 500 engine tests/server/test_cuda_graphs.py ;;
    ops) ops ops --no-compile ;;
    ops-compile) ops ops-compile ;;
    parity | tune | training) $1 ;;
    step)
        run 240 step "$python" benchmarks/step.py --device "$device" "${step[@]}"
        ;;
    profile)
        run 180 profile "$python" benchmarks/profile_step.py --device "$device" --model "$xl" \
            --checkpoints "$checkpoints" --out "$out/profile" "${profile[@]}"
        ;;
    forward)
        [[ -z ${UPSTREAM:-} ]] || run 240 forward "$python" benchmarks/forward.py "${upstream[@]}" \
            --device "$device" "${forward[@]}" --json "$out/forward.json"
        ;;
    http)
        run 300 http "$python" benchmarks/over_http.py --device "$device" --model "$xl" \
            "${http[@]}" --checkpoints "$checkpoints" --json "$out/http.json"
        ;;
    load) served 560 load --seconds 12 ;;
    kills) served 420 kills --kills 3 ;;
    none) throughput 200 none --guidance none --part sweep "${sizes[@]}" ;;
    autoguidance | cfg) throughput 240 "$1" --guidance "$1" --part sweep "${sizes[@]}" ;;
    start) throughput 300 start --part start ;;
    ablation) throughput 400 ablation --part ablation --batch 32 ;;
    xl512) xl=$xl512 throughput 300 xl512 --part sweep --batch 8 --batch 1 --batch 32 ;;
    deterministic) throughput 300 deterministic --guidance none --part deterministic ;;
    compiled) throughput 470 compiled --guidance none --part compiled --batch 32 --batch 1 ;;
    esac
}
sizes=()
[[ $device == cpu ]] || for size in 32 1 8 64 2 4 16; do sizes+=(--batch $size); done
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
for each in "${parts[@]}"; do part "$each"; done
exit $failed
