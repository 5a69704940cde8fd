#!/usr/bin/env bash
# GTA → BDD100K, 19 classes, source-free: from the official downloads to the reported row, and the comparison with it.
#
#   bash scripts/gta2bdd.sh               says what is missing, or runs every stage; stopped at any moment, it goes on
#   REHEARSE=1 bash scripts/gta2bdd.sh    every stage in miniature on a CPU, in minutes, with inputs that it makes itself
#   USE_SCC=0 bash scripts/gta2bdd.sh     adapts with PSA's labels, as the shipped log apparently did
#
# Expected   reported: before 37.9 (SFOCDA), after 44.3. Shipped log: best and last 44.43 @ epoch 55, where it stops (of 240),
#            mean of the last 20 epochs 42.29, whole image. Nobody has run this script on the real data yet.
# Tolerance  1.5 points of mIoU on best and last-20 mean, 5 per class, wider where the log itself wobbles (compare_logs.py).
#            The comparison covers the 56 epochs that the log has.
# Hours      adaptation: the log's epochs took 1117 s, so 240 take 74 h on the authors' four GPUs (type not published). Here:
#            not measured. PSA with vit_h is the other long stage: 7000 images at seconds to a minute each on one GPU.
# Memory     not published and not measured; crop 769 with 1 + 1 images a GPU. Too little memory: raise GPUS.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/task.sh

TASK=gta2bdd TITLE="GTA → BDD100K" SHIPPED_LOG=training_logs/seco_bdd
DATA=bdd DATA_ROOT="${DATA_ROOT:-data/bdd}" IMAGES="7000 + 1000" DISK_GB=60
EXP="${EXP:-DTST_bdd}"
CLASSES=(--class-num 19)
PREPARE=(bdd)
LIST_SUFFIX=""
CHECKPOINT="${CHECKPOINT:-pretrained/bdd_source_free.pth}"
CHECKPOINT_FROM="a GTA model adapted to BDD100K in DT-ST's format or by train_unimatch.py; the authors' is not published"

TEST_SIZE=(--test-size 1280 720)               # BDD100K's own size; DT-ST's sizes are for Cityscapes
TOP_P=0.5                                      # paper, section 3: the top 50 % of each class
SCC=(--iterations 50000)                       # released code: the checkpoint used for BDD (paper: 5000 for all)
LABELED_FRACTION=0.25                          # the log fits 5250 unlabeled of 7000 images
CROP=769                                       # the log
EVAL_MODE=original                             # the log
# All from the log: 240 epochs, 4 GPUs x 1 labeled image, learning rate 0.005.
GLOBAL_BATCH=4
ADAPT=(--backbone resnet101 --stem "${STEM:-deep}" --epochs 240 --global-batch "$GLOBAL_BATCH" --lr 0.005 --lr-multi 1.0
       --crop-size "$CROP")

main "$@"
