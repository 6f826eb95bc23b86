#!/usr/bin/env bash
# What is to be seen on a GPU, in two commands of at most 330 seconds each; README.md in this folder says more.
#   benchmarks/gpu.sh check     # is it right?
#   benchmarks/gpu.sh speed ["command of another program" ...]     # how fast is it? alone on the GPU, after check
# WHEELS: a folder with the packages of gpu-wheels.txt (.whl), if there is one; PYTHON: what to run them with;
# OUT, CACHE, PEERS, DEVICE, SIZE, SECONDS, LANES: see gpu.py.
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
