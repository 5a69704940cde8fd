# Finds or makes a Python environment that satisfies requirements.txt, and sets PYTHON to its interpreter.
#
#   source scripts/lib/setup.sh          what the scripts need
#   source scripts/lib/setup.sh test     what the tests need too (requirements-test.txt)
#   source scripts/lib/setup.sh lowest   the same in .venv-lowest, with the lowest versions that requirements.txt allows
#
# Looked at in this order: $PYTHON, the active environment's python, .venv of this repository. If none will do, .venv is
# made and the packages are installed into it, once: about 6 GB and two to five minutes for the stock torch builds.
# Newer versions than those that made the tables may be installed; requirements-lock.txt has those, and says how to get them.

setup_repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$setup_repo/scripts/lib/common.sh"
setup_files=("$setup_repo/requirements.txt")
[ -z "${1:-}" ] || setup_files+=("$setup_repo/requirements-test.txt")

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

setup_install() { # setup_install FOLDER PIP-OPTION…: sets PYTHON to the one of the environment in FOLDER
    local folder="$1" base name need=() bar=off
    shift
    base="$(first_python $setup_bases)"
    if [ ! -x "$folder/bin/python" ]; then
        echo "setup: making $folder with $("$base" --version)"
        "$base" -m venv "$folder" ||
            die "'$base -m venv' failed; on Debian and Ubuntu install python3-venv, then run this command again"
    fi
    for name in "${setup_files[@]}"; do need+=(-r "$name"); done
    echo "setup: installing packages into $folder (once; about 6 GB, some minutes)"
    [ ! -t 1 ] || bar=on
    "$folder/bin/python" -m pip install --disable-pip-version-check --progress-bar "$bar" "${need[@]}" "$@" ||
        die "pip could not install the packages above; check the network and the free disk space (6 GB)," \
            "then run this command again: it goes on where it stopped"
    PYTHON="$folder/bin/python"
}

setup_lowest() { # the versions are those of requirements.txt, `>=` read as `==`; Python 3.11 or 3.10, which all of them have
    local folder="$setup_repo/.venv-lowest" versions
    versions="$(sed -E 's/ *#.*//; /^$/d; s/>=/==/' "$setup_repo/requirements.txt")"
    PYTHON="$folder/bin/python"
    [ "$versions" != "$(cat "$folder/versions.txt" 2>/dev/null)" ] || return 0
    mkdir -p "$folder"
    echo "$versions" > "$folder/constraints.txt"
    setup_install "$folder" -c "$folder/constraints.txt"
    mv "$folder/constraints.txt" "$folder/versions.txt"
}

setup_bases="python3 python python3.13 python3.12 python3.11 python3.10"
if [ "${1:-}" = lowest ]; then
    setup_bases="python3.11 python3.10"
    setup_lowest
else
    for candidate in ${PYTHON:+"$PYTHON"} python3 python "$setup_repo/.venv/bin/python" ""; do
        if setup_satisfied "$candidate" "${setup_files[@]}"; then break; fi
    done
    PYTHON="$candidate"
    if [ -z "$PYTHON" ]; then setup_install "$setup_repo/.venv"; fi
fi
export PYTHON
