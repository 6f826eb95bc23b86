#!/usr/bin/env bash
# Lint, types and all tests; whatever else is given goes to pytest, for example:
#   ./scripts/test.sh tests/attention -k varlen -m 'not slow'
# Makes .venv and installs the package and the development tools on the first call. Works from any folder.
set -euo pipefail
# shellcheck source=scripts/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

install dev
cd "$root"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/basedpyright"
exec "$venv/bin/python" -m pytest -m "" "$@"  # the slow ones too
