# Finds or makes a Python environment that satisfies requirements.txt, and sets PYTHON to its interpreter. Defines `stage`.
#
#   source scripts/lib/setup.sh          what the scripts need
#   source scripts/lib/setup.sh test     what the tests need too (requirements-test.txt)
#
# Looked at in this order: $PYTHON, the active environment's python, .venv of this repository. If none will do, .venv is
# made and the packages are installed into it, once: about 6 GB and two to five minutes for the stock torch builds.
# Newer versions than those that made the tables may be installed; requirements-lock.txt has those, and says how to get them.

setup_repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
setup_files=("$setup_repo/requirements.txt")
[ "${1:-}" = test ] && setup_files+=("$setup_repo/requirements-test.txt")

# Exit code 0 if the interpreter $1 has every package of the files that follow in the version asked for.
setup_satisfied() {
    local python="$1"
    shift
    command -v "$python" >/dev/null 2>&1 && "$python" - "$@" <<'CHECK' 2>/dev/null
import re
import sys
from importlib.metadata import version

if sys.version_info < (3, 10):
    sys.exit(1)
numbers = lambda text: [int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3]]
for name in sys.argv[1:]:
    for line in open(name, encoding="utf-8"):
        need = line.split("#")[0].strip()
        if need:
            package, least = need.split(">=")
            if numbers(version(package)) < numbers(least):  # a missing package raises, which is exit code 1 as well
                sys.exit(1)
CHECK
}

setup_find() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python "$setup_repo/.venv/bin/python"; do
        if setup_satisfied "$candidate" "${setup_files[@]}"; then
            PYTHON="$candidate"
            return 0
        fi
    done
    return 1
}

setup_install() {
    local base candidate need=()
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            base="$candidate"
            break
        fi
    done
    if [ -z "${base:-}" ]; then
        echo "error: no Python 3.10 or newer found; install one and run this command again" >&2
        return 2
    fi
    if [ ! -x "$setup_repo/.venv/bin/python" ]; then
        echo "setup: making $setup_repo/.venv with $("$base" --version)"
        if ! "$base" -m venv "$setup_repo/.venv"; then
            echo "error: '$base -m venv' failed; on Debian and Ubuntu install python3-venv, then run this command again" >&2
            return 2
        fi
    fi
    for candidate in "${setup_files[@]}"; do need+=(-r "$candidate"); done
    echo "setup: installing packages into .venv (once; about 6 GB, some minutes)"
    candidate=off
    [ ! -t 1 ] || candidate=on
    if ! "$setup_repo/.venv/bin/python" -m pip install --disable-pip-version-check --progress-bar "$candidate" "${need[@]}"; then
        echo "error: pip could not install the packages above; check the network and the free disk space (6 GB)," \
            "then run this command again: it goes on where it stopped" >&2
        return 2
    fi
    PYTHON="$setup_repo/.venv/bin/python"
}

if ! setup_find; then
    setup_install || exit $?
    if ! setup_satisfied "$PYTHON" "${setup_files[@]}"; then
        echo "error: $PYTHON still lacks something of requirements.txt; delete .venv and run this command again" >&2
        exit 2
    fi
fi
export PYTHON

# stage NAME OUTPUT… [from INPUT…] -- COMMAND…: run a command unless it is done (scripts/lib/stage.py). Records: $STAGES in $OUT.
stage() { "$PYTHON" -m scripts.lib.stage "$OUT" "$STAGES" "$@"; }
