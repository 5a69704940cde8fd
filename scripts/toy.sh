#!/usr/bin/env bash
# SeCo from nothing to an adapted model on the embedded benchmark, on a CPU, with no data set and no checkpoint.
#
#   bash scripts/toy.sh                                one seed
#   SEEDS="0 1 2" CONTROLS=1 bash scripts/toy.sh       three seeds with the paper's ablation and the upper bound
#   RECIPE=paper bash scripts/toy.sh                   the paper's recipe (default: release), to runs/toy_paper
#   SMALLEST=1 OUT=runs/smallest bash scripts/toy.sh   everything in miniature: a test that all of it runs
#
# data → source model → pixel-level pseudo-labels → PSA → SCC → split → UniMatch → evaluation, by the same four scripts as
# the real tasks. Stopped at any moment, the same command goes on.
# Results: $OUT/index.html (for a browser), results.md, results.json, pictures/.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/rows.sh
SMALLEST="${SMALLEST:-0}"        # 1: everything in miniature
OUT="${OUT:-runs/toy_$RECIPE}"   # folder of the run
numbers SEEDS 99
one_of SMALLEST 0 1
show SEEDS RECIPE CONTROLS SMALLEST OUT
source scripts/lib/setup.sh

# The recipes' constants stay as they are. Smaller than in the real tasks, for images of 384 x 192 and a CPU:
CLASSES=(--class-num 19)
# (class weights instead of OHEM: rare classes have a few hundred pixels an image here)
NETWORK=(--backbone resnet10 --stem torchvision --crop-size 192 --scales 0.75 1.5 --class-balance 0.4 --loss-groups 1
         --channels-last --workers 0 --pictures-every 0)
# Real tasks start from a published model.
SOURCE=("${NETWORK[@]}" --epochs 12 --global-batch 8 --optimizer adamw --lr 0.004)
PIXEL=(--top-p 0.5)
# Real: vit_h, fp32.
SAM=tiny PSA=(--sam-type tiny --proposal-cache data/proposals)
# Real: ResNet-101, patches of 256 512, scale 0.5, 5000 iterations, learning rate 0.01.
SCC_RELEASE=(--backbone resnet10 --min-area 30 --patch-size 64 128 --iterations 600 --lr 0.1)
SCC_PAPER=(--backbone resnet10 --min-area 30 --scale 1 --iterations 600 --lr 0.05)
# Real: ResNet-101, fp32, crop 769, batch 8, 240 epochs.
ADAPT=("${NETWORK[@]}" --epochs 14 --global-batch 4 --lr 0.005 --eval-every 7)
DATA=data/toy SCENES=()
if [ "$SMALLEST" = 1 ]; then
    DATA="$OUT/data/toy" SCENES=(--scenes 8 6 2)
    SOURCE+=(--epochs 1) ADAPT+=(--epochs 1 --global-batch 2) # of an option the last value counts
    SCC_RELEASE+=(--iterations 2) SCC_PAPER+=(--iterations 2)
fi

for SEED in $SEEDS; do
    LISTS="$DATA/s$SEED/lists"
    SOURCE_LIST="$LISTS/source_train.txt" VAL_LIST="$LISTS/target_val.txt"
    TARGET_LIST="$LISTS/target_train.txt" TARGET_GT="$LISTS/target_train_gt.txt"
    run "$PYTHON" -m dataset.toy --seed "$SEED" --root-path "${DATA%/toy}" ${SCENES[@]+"${SCENES[@]}"}
    seed
done
report
