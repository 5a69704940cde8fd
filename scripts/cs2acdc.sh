#!/usr/bin/env bash
# Cityscapes → ACDC (fog, night, rain, snow), 19 classes, source-free: from the official downloads to predictions for its server.
#
#   bash scripts/cs2acdc.sh               says what is missing, or runs every command; stopped at any moment, it goes on
#   REHEARSE=1 bash scripts/cs2acdc.sh    every command in miniature on a CPU, in minutes, with inputs that it makes itself
#   LABELS=pseudo_labels bash scripts/cs2acdc.sh    starts from ready-made pixel labels, one folder of PNGs: CMA publishes its own,
#                                         pseudo_labels_train_ACDC_cma_deeplabv2.zip, beside the checkpoint
#
# Expected   not published: nobody has run SeCo here, and there is no log. To compare with, of DeepLabV2: CMA 50.4 (test) and 48.8
#            (validation), the source model 38.0 and 34.6. Nobody has run this script on the real data yet.
# Hours      not measured. PSA with vit_h: 1600 images, about 1.3 s each on an H100 (scripts/README.md, "Speed and memory"). The starting
#            labels take long too: 14 passes an image, and the model runs twice.
# Memory     not measured; crop 769 with GLOBAL_BATCH 8. Too little memory: raise GPUS.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/task.sh # the values that all tasks share

TASK=cs2acdc TITLE="Cityscapes → ACDC" DATA=acdc
DATA_ROOT="${DATA_ROOT:-data/acdc}"                            # the target data, unpacked from the official downloads
CHECKPOINT="${CHECKPOINT:-pretrained/deeplabv2_cityscapes.pth}" # what the starting labels come from
CHECKPOINT_FROM="CMA's Cityscapes DeepLabV2, research-collection.ethz.ch, handle 20.500.11850/626144; ready-made labels: LABELS=<folder>"
LABELS="${LABELS:-}"                                           # instead of CHECKPOINT: a folder of pixel labels, <image name>.png
SPLITS="${SPLITS:-splits/acdc}"                                # folder of the lists
EXP="${EXP:-CMA}"                                              # name of the starting labels
CLASSES=(--class-num 19)
TEST_SIZE=()                                  # CMA: images as they are, 1920x1080, in square windows
TOP_P=0.2                                     # CMA's portion of CBST's rule
SCC=(--iterations 5000)                       # paper
LABELED_FRACTION=0.5                          # as the SYNTHIA log
CROP=769                                      # as the logs of the other tasks
EVAL_MODE=square_windows                      # CMA's, so that its figures compare
GLOBAL_BATCH=8                                # as the GTA log
ADAPT=(--backbone resnet101 --epochs 240 --lr 0.005 --lr-multi 1.0) # as the logs
ready

# 1. Lists, and a check of every file.
run "$PYTHON" -m scripts.prepare_data acdc --root-path "$DATA_ROOT" --out "$SPLITS" ${EXPECT[@]+"${EXPECT[@]}"}

# 2. How good the start is: every pixel's prediction on the validation set, and in each condition where the layout tells it.
if [ -n "$PROBABILITIES$LABELS" ]; then
    echo "before: skipped, PROBABILITIES and LABELS have nothing of the validation set; evaluate that model where it comes from"
else
    run "$PYTHON" -m scripts.make_pseudo_labels --id-list-path "$SPLITS/val.txt" --root-path "$DATA_ROOT" "${CLASSES[@]}" \
        "${START[@]}" --exp "${EXP}_before" --top-p 1 ${TEST_SIZE[@]+"${TEST_SIZE[@]}"} \
        --out-list "$SPLITS/${EXP}_before/val.txt" --device "$DEVICE"
    for list in "$SPLITS"/val*.txt; do
        name="$(basename "$list" .txt)"
        run "$PYTHON" eval.py --labels "$SPLITS/${EXP}_before/val.txt" --id-list-path "$list" --root-path "$DATA_ROOT" \
            "${CLASSES[@]}" --out "$OUT/eval_before${name#val}"
    done
fi

# 3. Starting labels: CBST's rule on the mean of seven sizes and mirror images, as CMA's own (which ranks every tenth pixel of a
#    class, not every fourth); or labels that are ready.
if [ -n "$LABELS" ]; then
    run "$PYTHON" -m scripts.prepare_data labels --id-list-path "$SPLITS/train.txt" --root-path "$DATA_ROOT" "${CLASSES[@]}" \
        --labels "$LABELS" --exp "$EXP" --out-list "$SPLITS/$EXP/train.txt"
else
    if [ -z "$PROBABILITIES" ]; then START+=(--multi-scale); fi
    run "${LAUNCH[@]}" -m scripts.make_pseudo_labels --id-list-path "$SPLITS/train.txt" --root-path "$DATA_ROOT" \
        "${CLASSES[@]}" "${START[@]}" --exp "$EXP" --rule cbst --top-p "$TOP_P" ${TEST_SIZE[@]+"${TEST_SIZE[@]}"} \
        --out-list "$SPLITS/$EXP/train.txt" --device "$DEVICE"
fi

# 4. PSA.
run "${LAUNCH[@]}" seco_sam.py --id-list-path "$SPLITS/$EXP/train.txt" --root-path "$DATA_ROOT" "${CLASSES[@]}" \
    --sam-type "$SAM_TYPE" ${SAM_CHECKPOINT:+--sam-checkpoint "$SAM_CHECKPOINT"} --recipe "$RECIPE" --vis 8 \
    --device "$DEVICE" ${CACHE[@]+"${CACHE[@]}"}
FINAL="$PSA_EXP"

# 5. SCC.
if [ "$USE_SCC" = 1 ]; then
    run "${LAUNCH[@]}" seco_scc.py --id-list-path "$SPLITS/$PSA_EXP/train.txt" --root-path "$DATA_ROOT" "${CLASSES[@]}" \
        --recipe "$RECIPE" "${SCC[@]}" --backbone-weights "$SCC_WEIGHTS" --seed "$SEED" --device "$DEVICE"
    FINAL="${PSA_EXP}_scc$SUFFIX"
fi

# 6. The most reliable images are the labeled subset.
run "$PYTHON" -m scripts.make_split --id-list-path "$SPLITS/$FINAL/train.txt" --root-path "$DATA_ROOT" "${CLASSES[@]}" \
    --labeled-fraction "$LABELED_FRACTION" --out "$SPLITS/$FINAL"

# 7. UniMatch.
run "${LAUNCH[@]}" train_unimatch.py --labeled-id-path "$SPLITS/$FINAL/labeled.txt" \
    --unlabeled-id-path "$SPLITS/$FINAL/unlabeled.txt" --val-id-path "$SPLITS/val.txt" --root-path "$DATA_ROOT" \
    "${CLASSES[@]}" "${ADAPT[@]}" --stem "$STEM" --global-batch "$GLOBAL_BATCH" --crop-size "$CROP" \
    --backbone-weights "$BACKBONE_WEIGHTS" --eval-mode "$EVAL_MODE" --seed "$SEED" \
    --save-path "$OUT/adapt" --device "$DEVICE"

# 8. Predictions of the validation images, evaluated as a whole and in each condition; those of the test images as the server
#    wants them: PNGs of train IDs in a folder labelTrainIds, zipped.
PREDICT=("${LAUNCH[@]}" eval.py --checkpoint "$OUT/adapt/latest.pth" --root-path "$DATA_ROOT" "${CLASSES[@]}" \
    --mode "$EVAL_MODE" --device "$DEVICE")
run "${PREDICT[@]}" --id-list-path "$SPLITS/val.txt" --predictions "$OUT/val" --out "$OUT/eval_after"
for list in "$SPLITS"/val_*.txt; do
    if [ ! -f "$list" ]; then break; fi
    name="$(basename "$list" .txt)"
    run "$PYTHON" eval.py --labels "$OUT/val/rgb_anon" --id-list-path "$list" --root-path "$DATA_ROOT" "${CLASSES[@]}" \
        --out "$OUT/eval_after${name#val}"
done
if [ ! -f "$SPLITS/test.txt" ]; then
    echo "predictions for the server: skipped, $DATA_ROOT has no test images"
else
    run "${PREDICT[@]}" --id-list-path "$SPLITS/test.txt" --predictions "$OUT/test"
    rm -rf "$OUT/server"
    mkdir -p "$OUT/server/labelTrainIds"
    find "$OUT/test" -name '*.png' ! -name '.*' -exec cp {} "$OUT/server/labelTrainIds" \;
    run "$PYTHON" -m zipfile -c "$OUT/acdc_test.zip" "$OUT/server/labelTrainIds"
fi
run "$PYTHON" -m scripts.lib.page "$OUT"
echo "expected value: not published. CMA with DeepLabV2: 50.4 (test), 48.8 (validation); its source model 38.0, 34.6"
finish
