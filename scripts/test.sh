#!/usr/bin/env bash
# Run lint, type checks and the quick tests; with --all also the slow tests. Other arguments go to pytest, for example:
#   ./scripts/test.sh --all
#   ./scripts/test.sh tests/attention -k varlen -n 0
# The first call makes .venv and installs the package and the development tools. Works from any folder.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

words=()
selection="not slow"
for word in "$@"; do
    if [[ $word == --all ]]; then selection=""; else words+=("$word"); fi
done

install dev
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/basedpyright"
# A worker for each core, but at most four: each worker starts ranks and programs, which need memory.
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist worksteal --durations 10 \
    -m "$selection" ${words[@]+"${words[@]}"}
