# The commands of a seed, shared by toy.sh and camvid.sh, which source this file after setting:
#
#   OUT  RECIPE  CONTROLS    as their heads say; everything of a seed goes to $W, which is $OUT/seed<n>
#   CLASSES SOURCE PIXEL PSA SCC_RELEASE SCC_PAPER SPLIT ADAPT EVAL   arrays: options of the commands
#   SAM         SAM's type in the names of outputs
#   DATA        folder that the lists' image paths start from, linked into the seed's folder
#   SOURCE_LIST TARGET_LIST TARGET_GT VAL_LIST   the seed's lists

seed_folder() { # its folder $W, with the data in it
    W="$OUT/seed$SEED"
    mkdir -p "$W"
    ln -sfn "$(cd "$DATA" && pwd)" "$W/$(basename "$DATA")"
}

source_model() {
    run "$PYTHON" train_unimatch.py --supervised --labeled-id-path "$SOURCE_LIST" --root-path "$W" "${CLASSES[@]}" \
        "${SOURCE[@]}" --seed "$SEED" --save-path "$W/source"
    validate before "$W/source/latest.pth"
}

validate() { # validate NAME CHECKPOINT
    run "$PYTHON" eval.py --checkpoint "$2" --id-list-path "$VAL_LIST" --root-path "$W" "${CLASSES[@]}" "${EVAL[@]}" \
        --out "$W/eval/$1"
}

quality() { # quality NAME LIST: of labels, against ground truth: a diagnostic, nothing that is trained sees it
    run "$PYTHON" eval.py --labels "$2" --id-list-path "$TARGET_GT" --root-path "$W" "${CLASSES[@]}" --out "$W/eval/quality_$1"
}

pixel_labels() {
    run "$PYTHON" -m scripts.make_pseudo_labels --id-list-path "$TARGET_LIST" --root-path "$W" \
        --checkpoint "$W/source/latest.pth" --exp pix --out-list "$W/splits/pix/all.txt" "${CLASSES[@]}" "${PIXEL[@]}"
    quality pixel "$W/splits/pix/all.txt"
}

psa() { # psa NAME LABELS OPTION…: PSA of the pixel labels, in the folder LABELS
    run "$PYTHON" seco_sam.py --id-list-path "$W/splits/pix/all.txt" --root-path "$W" "${CLASSES[@]}" "${PSA[@]}" "${@:3}"
    quality "$1" "$W/splits/$2/all.txt"
}

scc() { # scc NAME LABELS RECIPE: SCC of the labels in a folder, in <folder>_scc or <folder>_scc_paper
    local options=("${SCC_RELEASE[@]}") corrected="$2_scc"
    if [ "$3" = paper ]; then options=("${SCC_PAPER[@]}") corrected="$2_scc_paper"; fi
    run "$PYTHON" seco_scc.py --id-list-path "$W/splits/$2/all.txt" --root-path "$W" "${CLASSES[@]}" "${options[@]}" \
        --recipe "$3" --backbone-weights "$W/source/latest.pth" --seed "$SEED"
    quality "$1" "$W/splits/$corrected/all.txt"
}

adapt() { # adapt NAME LABELS: split the labels and train UniMatch with them, from the source model
    local split="$W/splits/split_$1"
    run "$PYTHON" -m scripts.make_split --id-list-path "$W/splits/$2/all.txt" --root-path "$W" "${CLASSES[@]}" "${SPLIT[@]}" \
        --out "$split"
    run "$PYTHON" train_unimatch.py --labeled-id-path "$split/labeled.txt" --unlabeled-id-path "$split/unlabeled.txt" \
        --val-id-path "$VAL_LIST" --root-path "$W" "${CLASSES[@]}" "${ADAPT[@]}" --init-checkpoint "$W/source/latest.pth" \
        --seed "$SEED" --save-path "$W/adapt_$1"
    validate "$1" "$W/adapt_$1/latest.pth"
}

seco() { # seco RECIPE: PSA, SCC and adaptation; the paper's rows and folders carry its name
    local end=""
    if [ "$1" = paper ]; then end=_paper; fi
    psa "psa$end" "pix_$SAM$end" --recipe "$1" --vis 4
    scc "scc$end" "pix_$SAM$end" "$1"
    adapt "seco$end" "pix_$SAM${end}_scc$end"
}

# The rows of the paper's Tables 6 and 7 between the source model and SeCo, PSA that keeps the pixel label where no mask
# reaches (a departure, off by default), and the upper bound.
controls() { # controls RECIPE
    local end=""
    if [ "$1" = paper ]; then end=_paper; fi
    adapt pixel pix
    psa prompting "pix_$SAM${end}_only_prompting" --recipe "$1" --only-prompting
    adapt prompting "pix_$SAM${end}_only_prompting"
    psa alignment "pix_$SAM${end}_only_alignment" --recipe "$1" --only-alignment
    adapt alignment "pix_$SAM${end}_only_alignment"
    adapt "psa$end" "pix_$SAM$end"
    psa fill "pix_$SAM${end}_fill" --recipe "$1" --fill pixel
    adapt fill "pix_$SAM${end}_fill"
    scc scc_pixel pix "$1"
    adapt scc_pixel "pix_scc$end"
    # The upper bound sees what no method may see: ground truth of the target's training images.
    run "$PYTHON" train_unimatch.py --supervised --labeled-id-path "$TARGET_GT" --val-id-path "$VAL_LIST" --root-path "$W" \
        "${CLASSES[@]}" "${ADAPT[@]}" --init-checkpoint "$W/source/latest.pth" --seed "$SEED" --save-path "$W/adapt_bound"
    validate bound "$W/adapt_bound/latest.pth"
}

rows() { # the recipes and the controls that are asked for
    if [ "$RECIPE" != paper ]; then seco release; fi
    if [ "$RECIPE" != release ]; then seco paper; fi
    if [ "$CONTROLS" = 1 ]; then controls "$([ "$RECIPE" = paper ] && echo paper || echo release)"; fi
}

report() { # tables, pictures and the page over all seeds
    if [ "$RECIPE" != release ]; then run "$PYTHON" -m scripts.dev.sweep_thresholds "$OUT" "${CLASSES[@]}"; fi
    run "$PYTHON" -m scripts.lib.report "$OUT" "${CLASSES[@]}"
    run "$PYTHON" -m scripts.lib.page "$OUT"
    cat "$OUT/results.md"
    printf '\nThe same with pictures, in a browser: %s\n' "$OUT/index.html"
}
