#!/usr/bin/env bash
# Train configs/debugmodel.toml; whatever else is given goes to the trainer, for example:
#   ./scripts/train.sh --training.steps 20 --model.attention flex
# Makes .venv and installs the package on the first call. Works from any folder; outputs/ is made in that one.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

install ""
exec "$venv/bin/python" "$root/torchtitan_lite/train.py" --config "$root/configs/debugmodel.toml" "$@"
