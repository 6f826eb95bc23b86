#!/usr/bin/env bash
# torchrun for schedulers, as `torchtitan-lite launch`; all arguments go to torchrun, for example:
#   ./scripts/launch.sh --nproc_per_node 8 torchtitan_lite/train.py --config configs/debugmodel.toml
# SIGTERM, SIGUSR1, SIGINT and SIGHUP reach the ranks, which may take as long as they need to save, and the exit
# status is theirs. Uses .venv if there is one, else the Python that the variable PYTHON names. Installs nothing.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)

python=$root/.venv/bin/python
if [[ ! -x $python ]]; then python=${PYTHON:-python3}; fi
exec "$python" "$root/torchtitan_lite/launch/torchrun.py" "$@"
