#!/usr/bin/env bash
# torchrun for schedulers; whatever is given goes to torchrun, for example:
#   ./scripts/launch.sh --nproc_per_node 8 torchtitan_lite/train.py --config configs/debugmodel.toml
# SIGTERM and SIGUSR1 reach the ranks, which may take as long as they need to save, and the exit status is
# theirs: see launch.py. Uses .venv where there is one, else the Python that PYTHON names. Installs nothing.
set -euo pipefail
scripts=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)

python=$scripts/../.venv/bin/python
if [[ ! -x $python ]]; then python=${PYTHON:-python3}; fi
exec "$python" "$scripts/launch.py" "$@"
