#!/usr/bin/env bash
# All that is checked and measured on a GPU, in an order that keeps the most if time runs out:
# kernels against fp64, recorded numbers, timings, the tuning table, a model's forward.
#     benchmarks/gpu.sh OUT      (UPSTREAM=DIR: a clone of bytetriper/RAE, to compare with)
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?where the results go}
python=${PYTHON:-.venv/bin/python}
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
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
run kernels "$python" -m pytest -p no:cacheprovider tests/kernels -x -q
run parity "$python" benchmarks/parity.py tests/golden --device cuda --kernels triton
run tune "$python" -m rae.server tune --out "$out/tuning.json"
run step "$python" benchmarks/step.py
run ops "$python" benchmarks/ops.py --device cuda --out "$out/ops"
if [[ -n ${UPSTREAM:-} ]]; then
    run forward "$python" benchmarks/forward.py --upstream "$UPSTREAM" --device cuda --batch 32 \
        --json "$out/forward.json"
fi
exit $failed
