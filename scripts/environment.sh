# shellcheck shell=bash
# Sourced by train.sh and test.sh. Makes $root/.venv from bash and Python alone and installs the package in it.

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/torchtitan_lite.stamp
unfinished=$venv/torchtitan_lite.unfinished

# Fails on a Python that cannot make the environment. Must parse on any Python, however old.
readonly usable='import sys; assert (3, 11) <= sys.version_info[:2] < (3, 15); import ensurepip, venv'

# `install ""` installs the packages of a run, `install dev` those of the tests too. `dev` includes "".
install() {
    local extra=$1
    if is_installed "$extra"; then return; fi
    local python
    python=$(find_python)
    # One install at a time. The lock ends with file descriptor 9, so a killed script leaves no lock behind.
    exec 9>"$root/.venv.lock"
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    if ! is_installed "$extra"; then make_and_install "$python" "$extra"; fi
    exec 9>&-
}

is_installed() {
    [[ -f $stamp && ! -e $unfinished ]] || return 1
    local have wanted
    have=$(<"$stamp")
    wanted=$(fingerprint) || return 1
    [[ $have == "$wanted dev" || $have == "$wanted $1" ]]
}

make_and_install() {
    local python=$1 extra=$2
    # pip may take an interrupted install for a complete one, so the environment is made again.
    if [[ -e $unfinished ]] || ! "$venv/bin/python" -c "$usable; import pip" >/dev/null 2>&1; then
        echo "Making $venv with $("$python" --version)" >&2
        "$python" -m venv --clear "$venv"
    fi
    echo "Installing into $venv; the first install takes some minutes" >&2
    : >"$unfinished"
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet \
        --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}" >&2
    printf '%s %s\n' "$(fingerprint)" "$extra" >"$stamp"
    rm -f "$unfinished"
}

# A hash of everything that an install depends on: two files, the folder of the repository, and the Python.
fingerprint() {
    "$venv/bin/python" - "$root" 2>/dev/null <<'PY'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
content = b"".join((root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
print(hashlib.sha256(content + f"{root} {sys.version}".encode()).hexdigest())
PY
}

find_python() {
    local candidate candidates=(python3.13 python3.12 python3.11 python3 python)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        # Run each candidate: a name on PATH may be a shim that only reports that Python is not installed.
        if "$candidate" -c "$usable" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    echo "error: ${PYTHON:-none of python3.13, python3.12, python3.11, python3 and python} can be used." >&2
    echo "Needed: Python 3.11, 3.12 or 3.13 with its venv module (Debian, Ubuntu: apt install python3-venv)." >&2
    echo "To name a Python: PYTHON=/path/to/python3.12 $0" >&2
    return 1
}
