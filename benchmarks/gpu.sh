#!/usr/bin/env bash
# Checks and measures the trainer on a GPU, in two commands of at most 330 seconds each. README.md here says more.
#   benchmarks/gpu.sh check     # is it right?
#   benchmarks/gpu.sh speed ["command of another program" ...]     # how fast is it? After check, alone on the GPU
# WHEELS (.whl): a folder with the packages of gpu-wheels.txt, installed if it exists. PYTHON: the Python to use.
# The other variables are those of gpu.py: see `benchmarks/gpu.sh check --help`.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
wheels=${WHEELS:-.whl}
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"

if [ -d "$wheels" ]; then
    PACKAGES=$(mktemp -d)
    trap 'rm -rf "$PACKAGES"' EXIT
    "$python" -m pip --disable-pip-version-check install --quiet --root-user-action ignore \
        --no-index --no-deps --no-compile --target "$PACKAGES" "$wheels"/*.whl
    export PACKAGES PYTHONPATH="$PACKAGES:$PYTHONPATH"
fi
"$python" "$here/gpu.py" "$@"
