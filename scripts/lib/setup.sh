# Finds or makes a Python environment that satisfies requirements.txt, and sets PYTHON to its interpreter.
#
#   source scripts/lib/setup.sh          what the scripts need
#   source scripts/lib/setup.sh test     what the tests need too (requirements-test.txt)
#
# Looked at in this order: $PYTHON, the active environment's python, .venv of this repository. If none will do, .venv is
# made and the packages are installed into it, once: about 6 GB and two to five minutes for the stock torch builds.
# Newer versions than those that made the tables may be installed; requirements-lock.txt has those, and says how to get them.

setup_repo="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
source "$setup_repo/scripts/lib/common.sh"
setup_files=("$setup_repo/requirements.txt")
[ -z "${1:-}" ] || setup_files+=("$setup_repo/requirements-test.txt")

setup_satisfied() { # setup_satisfied PYTHON: whether it has every package in the version asked for
    command -v "$1" >/dev/null 2>&1 && "$1" - "${setup_files[@]}" <<'CHECK' 2>/dev/null
import sys
from importlib.metadata import version

from packaging.requirements import Requirement  # which matplotlib brings; a missing package raises: exit code 1 as well

for name in sys.argv[1:]:
    for line in open(name, encoding="utf-8"):
        if need := line.split("#")[0].strip():
            need = Requirement(need)
            if not need.specifier.contains(version(need.name), prereleases=True):
                sys.exit(1)
sys.exit(sys.version_info < (3, 10))
CHECK
}

setup_install() {
    local name
    if [ ! -x "$PYTHON" ]; then
        name="$(first_python)"
        echo "setup: making .venv with $("$name" --version)"
        "$name" -m venv "$setup_repo/.venv" ||
            die "'$name -m venv' failed; on Debian and Ubuntu install python3-venv, then run this command again"
    fi
    echo "setup: installing packages into .venv (once; about 6 GB, some minutes)"
    "$PYTHON" -m pip install --disable-pip-version-check "${setup_files[@]/#/-r}" ||
        die "pip could not install the packages above; check the network and the free disk space (6 GB)," \
            "then run this command again: it goes on where it stopped"
}

for candidate in ${PYTHON:+"$PYTHON"} python3 python "$setup_repo/.venv/bin/python" ""; do
    if setup_satisfied "$candidate"; then break; fi
done
PYTHON="${candidate:-$setup_repo/.venv/bin/python}"
if [ -z "$candidate" ]; then setup_install; fi
export PYTHON
