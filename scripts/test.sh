#!/usr/bin/env bash
# Lint, types and the quick tests, or all of them with --all; whatever else is given goes to pytest, for example:
#   ./scripts/test.sh --all
#   ./scripts/test.sh tests/attention -k varlen -n 0
# Makes .venv and installs the package and the development tools on the first call. Works from any folder.
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
# A worker for each core, but no more than memory is there for: each has ranks and programs of its own.
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist worksteal --durations 10 \
    -m "$selection" ${words[@]+"${words[@]}"}
