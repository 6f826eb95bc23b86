#!/usr/bin/env bash
# All figures of a GPU, each as a line of JSON in a file of $OUT (default: outputs/benchmarks):
#   benchmarks/cuda.sh ["command of another program, which prints such a line" ...]
# The other programs run in turns with our step. README.md in this folder says what to install.
# DEVICE=cpu tries it out anywhere, with sizes that a laptop can take, and compiles one of the runs.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
device=${DEVICE:-cuda}
out=${OUT:-outputs/benchmarks}
mkdir -p "$out"

step=(--dtype bf16)
if [ "$device" = cuda ]; then
    step+=(--compile)
    small=(--preset qwen3-0.6b --seq 4096 --batch 4 --warmup 10 --steps 30)
    large=(--preset llama3-8b --seq 8192 --batch 1 --warmup 5 --steps 15)
    layers="20 18 16 14 12 8"
    backends="sdpa varlen flex flex_flash"
    sequences="1024 4096 16384"
    vocabularies="512 8192 32768 151936"
    head_dim=128 rows=16384 dim=1024
else
    small=(--preset tiny --layers 1 --seq 128 --batch 2 --warmup 1 --steps 2)
    large=("${small[@]}" --compile)
    layers="1"
    backends="sdpa varlen flex"
    sequences="128"
    vocabularies="512"
    head_dim=32 rows=512 dim=64
fi

# run NAME SCRIPT [OPTIONS]: what fails says so and stops nothing.
run() {
    local name=$1 script=$2
    shift 2
    echo "== $name: $script $*"
    if "$python" "$here/$script" "$@" --device "$device" --json >"$out/$name.json" 2>"$out/$name.log"; then
        cat "$out/$name.json"
    else
        tail -n 3 "$out/$name.log"
        return 1
    fi
}

for backend in $backends; do
    run "step-$backend" step.py "${small[@]}" "${step[@]}" --attention "$backend" || true
    run "packed-$backend" step.py "${small[@]}" "${step[@]}" --attention "$backend" --documents 16 700 || true
done
run step-eager step.py "${small[@]}" --dtype bf16 || true

comparisons=()
for command in "$@"; do comparisons+=(--compare "$command"); done
if [ "$#" -gt 0 ]; then
    run compared step.py "${small[@]}" "${step[@]}" --attention "${ATTENTION:-sdpa}" "${comparisons[@]}" || true
fi

# As many blocks as fit.
for n in $layers; do
    run "large-$n" step.py "${large[@]}" "${step[@]}" --layers "$n" && break
done

for backend in $backends; do
    run "attention-$backend" attention.py --backends "$backend" --seq $sequences --head-dim "$head_dim" --dtype bf16 || true
done
run loss loss.py --vocabularies $vocabularies --rows "$rows" --dim "$dim" --dtype bf16 || true
echo "all in $out"
