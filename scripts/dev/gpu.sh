#!/usr/bin/env bash
# What a GPU should show, part by part, in one folder with a table (runs/gpu, or --out FOLDER): about 15 minutes on an H100.
#
#   bash scripts/dev/gpu.sh                                 # options as of `python -m scripts.dev.gpu --help`
#   bash scripts/dev/gpu.sh --device cpu --out runs/cpu     # in miniature, two minutes on 2 cores
#
# A part that fails or takes longer than LIMIT seconds leaves the others, and what it has measured until then. At the end run the
# tests that need a GPU (pytest).
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/lib/setup.sh
case "${1:-}" in -h | --help) exec "$PYTHON" -m scripts.dev.gpu --help ;; esac
failed=0
limited() { # limited NAME MODULE OPTION…
    timeout -k 5 "${LIMIT:-240}" "$PYTHON" -m "${@:2}" || { failed=1; echo "$1: failed, or took too long"; }
}
for part in psa_equal psa_speed scc unimatch scc_compiled unimatch_compiled; do limited "$part" scripts.dev.gpu "$part" "$@"; done
limited tests pytest -q -p no:xdist -m gpu tests/test_gpu.py
exit "$failed"
