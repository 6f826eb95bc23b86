#!/usr/bin/env bash
# Train configs/debugmodel.toml. Arguments go to the trainer, for example:
#   ./scripts/train.sh --training.steps 20 --model.attention flex
# The first call makes .venv and installs the package. Works from any folder, and writes outputs/ there.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

install ""
exec "$venv/bin/python" "$root/torchtitan_lite/train.py" --config "$root/configs/debugmodel.toml" "$@"
