#!/usr/bin/env bash
# The rows of the paper's Tables 6 to 8 and the thresholds of its Figure 6, mean and standard deviation over three seeds.
#
#   bash scripts/ablation.sh toy                              the embedded benchmark: about an hour and a half on 2 cores
#   CAMVID_ROOT=… bash scripts/ablation.sh camvid               day → dusk on CamVid
#   SEEDS="0 1", OUT=…                                        other seeds, another folder (default: runs/ablation_<name>)
#
# Adapted models: pixel-level labels (no SAM), prompting only, semantic alignment only, SCC without PSA, PSA, PSA that keeps
# pixel labels where no mask reaches, PSA + SCC in both recipes, the upper bound. tau_ns and tau_cr are swept on the quality of
# the labels (scripts/lib/sweep.py).
# Stopped at any moment, the same command goes on. Results: $OUT/results.md, sweep.md, pictures/ablation.png, sweep.png.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/common.sh
case "${1:-}" in
    toy | camvid) ;;
    -h | --help) arguments "$1" ;;
    *) die "bash scripts/ablation.sh toy|camvid" ;;
esac
SEEDS="${SEEDS:-0 1 2}"
OUT="${OUT:-runs/ablation_$1}"
export SEEDS OUT RECIPE=both CONTROLS=1
exec bash "scripts/$1.sh" "${@:2}"
