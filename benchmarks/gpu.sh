#!/usr/bin/env bash
# Check and measure the trainer on a GPU, in two commands of at most 330 seconds each. See README.md in this folder.
#   benchmarks/gpu.sh check     # are the results correct?
#   benchmarks/gpu.sh speed ["command of another program" ...]     # how fast is it? Run it after check, alone on the GPU
# WHEELS (.whl): a folder with the packages of gpu-wheels.txt, installed if it exists. PYTHON: the Python to use.
# gpu.py reads further variables: see `benchmarks/gpu.sh check --help`.
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
