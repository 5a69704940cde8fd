#!/usr/bin/env bash
# What a GPU should show, in one folder with a table: bash scripts/dev/gpu.sh --help lists the options.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source scripts/lib/setup.sh
exec "$PYTHON" -m scripts.dev.gpu "$@"
