#!/usr/bin/env bash
# Sets up an environment if need be and runs the tests (about four minutes on 2 cores).
#   bash scripts/test.sh                 all tests but those marked slow
#   bash scripts/test.sh -m slow         the slow ones: every task rehearsed, runs killed and changed (ten minutes more)
#   bash scripts/test.sh tests/test_x.py any option of pytest (-n 8: eight processes; --pdb needs -n 0)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/common.sh
case "${1:-}" in -h | --help) arguments "$1" ;; esac
source scripts/lib/setup.sh test
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=15 "$@"
