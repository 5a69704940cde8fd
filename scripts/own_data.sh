#!/usr/bin/env bash
# SeCo on your own images: edit the values of this file, or of a copy beside it, and run it. Stopped, the same command goes on.
#
#   bash scripts/own_data.sh
#
# You need: a folder of images with a list of their paths (one a line, below ROOT), a file of your classes, and, from your own
# model, one array of class probabilities an image (K x H x W), <image path>.npy below PROBABILITIES (README.md). The end is a
# page, $OUT/index.html: what became of the labels at every stage, whether each stage helped, pictures.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/common.sh

ROOT="${ROOT:-my/data}"                            # the images; labels are written beside them
IMAGES="${IMAGES:-my/train.txt}"                   # list of the images to adapt to
CLASSES="${CLASSES:-my/classes.txt}"               # a class a line: name, stuff or thing, colour (`sky stuff 70,130,180`)
PROBABILITIES="${PROBABILITIES:-my/probs}"         # arrays of your model; or leave it empty and name a network:
CHECKPOINT="${CHECKPOINT:-}"                       # of UniMatch, DT-ST, CMA, ProDA, SHADE or train_unimatch.py
SAM_TYPE="${SAM_TYPE:-vit_h}"                      # bash scripts/download.sh sam vit_h; on a CPU try vit_b
VALIDATION="${VALIDATION:-}"                       # list `<image> <ground truth>` that measures the result; empty: none
EXP="${EXP:-mine}"                                 # name of the labels: $ROOT/$EXP, ${EXP}_<SAM>, ${EXP}_<SAM>_scc
SPLITS="${SPLITS:-my/splits}"                      # folder of the lists that are written
OUT="${OUT:-runs/$EXP}"                            # folder of the network and the page
GPUS="${GPUS:-1}"                                  # processes, one a GPU; 1 on a CPU too
SCC="${SCC:-}"                                     # more options of seco_scc.py, as --min-area 30
ADAPT="${ADAPT:---backbone-weights imagenet --stem torchvision}"   # more options of train_unimatch.py, as --epochs 60
arguments "$@"
show ROOT IMAGES CLASSES PROBABILITIES CHECKPOINT SAM_TYPE VALIDATION EXP SPLITS OUT GPUS SCC ADAPT
for file in "$IMAGES" "$CLASSES" $VALIDATION; do [ -f "$file" ] || die "$file: no such file; edit the values in $0"; done
source scripts/lib/setup.sh
LAUNCH=("$PYTHON") START=(--probabilities "$PROBABILITIES") PSA="${EXP}_$(sam_name "$SAM_TYPE")"
if [ "$GPUS" -gt 1 ]; then LAUNCH+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS"); fi
if [ -n "$CHECKPOINT" ]; then START=(--checkpoint "$CHECKPOINT"); fi

# 1. Starting labels: the most confident half of each class.
run "${LAUNCH[@]}" -m scripts.make_pseudo_labels --id-list-path "$IMAGES" --root-path "$ROOT" "${START[@]}" \
    --classes "$CLASSES" --exp "$EXP" --out-list "$SPLITS/$EXP/all.txt"

# 2. PSA: labels take the shapes of SAM's masks. (The classes stand beside the labels from here on.)
run "${LAUNCH[@]}" seco_sam.py --id-list-path "$SPLITS/$EXP/all.txt" --root-path "$ROOT" --sam-type "$SAM_TYPE" --vis 8

# 3. SCC: noisy connectivities are corrected or dropped.
run "${LAUNCH[@]}" seco_scc.py --id-list-path "$SPLITS/$PSA/all.txt" --root-path "$ROOT" $SCC

# 4. The most reliable images are the labeled subset. To go on in your own training code, stop here: the lists are in
#    $SPLITS/${PSA}_scc, the labels in $ROOT/${PSA}_scc, PNGs of train IDs, 255 for none.
run "$PYTHON" -m scripts.make_split --id-list-path "$SPLITS/${PSA}_scc/all.txt" --root-path "$ROOT"

# 5. UniMatch.
run "${LAUNCH[@]}" train_unimatch.py --labeled-id-path "$SPLITS/${PSA}_scc/labeled.txt" \
    --unlabeled-id-path "$SPLITS/${PSA}_scc/unlabeled.txt" ${VALIDATION:+--val-id-path "$VALIDATION"} --root-path "$ROOT" \
    $ADAPT --save-path "$OUT/adapt"

# 6. Evaluation, where there is ground truth, and the page.
if [ -n "$VALIDATION" ]; then
    run "${LAUNCH[@]}" eval.py --checkpoint "$OUT/adapt/latest.pth" --id-list-path "$VALIDATION" --root-path "$ROOT" \
        --out "$OUT/eval_after"
fi
run "$PYTHON" -m scripts.lib.page "$OUT"
