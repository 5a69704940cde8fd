# What toy.sh and camvid.sh share: values that are the same in both, and the commands of a seed, for which they set:
#
#   OUT         folder of the run; everything of a seed goes to $W, which is $OUT/seed<n>
#   CLASSES SOURCE PIXEL PSA SCC_RELEASE SCC_PAPER ADAPT   arrays: options of the commands
#   SAM         SAM's type in the names of outputs
#   DATA        folder that the lists' image paths start from, linked into the seed's folder
#   SOURCE_LIST TARGET_LIST TARGET_GT VAL_LIST   the seed's lists

source scripts/lib/common.sh
SEEDS="${SEEDS:-0}"           # of training, in toy.sh of the data too: one or several; the tables are over these
RECIPE="${RECIPE:-release}"   # release, paper or both
CONTROLS="${CONTROLS:-0}"     # 1: the paper's ablation and the upper bound too
arguments "$@"
one_of RECIPE release paper both
one_of CONTROLS 0 1

validate() { # validate NAME CHECKPOINT
    MODELS="$MODELS $1"
    run "$PYTHON" eval.py --checkpoint "$2" --id-list-path "$VAL_LIST" --root-path "$W" "${CLASSES[@]}" --mode original \
        --out "$W/eval/$1"
}

quality() { # quality NAME LIST: of labels, against ground truth: a diagnostic, nothing that is trained sees it
    LABELS="$LABELS $1"
    run "$PYTHON" eval.py --labels "$2" --id-list-path "$TARGET_GT" --root-path "$W" "${CLASSES[@]}" --out "$W/eval/quality_$1"
}

psa() { # psa NAME LABELS OPTION…: PSA of the pixel labels, in the folder LABELS
    run "$PYTHON" seco_sam.py --id-list-path "$W/splits/pix/all.txt" --root-path "$W" "${CLASSES[@]}" "${PSA[@]}" \
        --recipe "$BY" "${@:3}"
    quality "$1" "$W/splits/$2/all.txt"
}

scc() { # scc NAME LABELS: SCC of the labels in a folder, in <folder>_scc or <folder>_scc_paper
    local options=("${SCC_RELEASE[@]}")
    if [ "$BY" = paper ]; then options=("${SCC_PAPER[@]}"); fi
    run "$PYTHON" seco_scc.py --id-list-path "$W/splits/$2/all.txt" --root-path "$W" "${CLASSES[@]}" "${options[@]}" \
        --recipe "$BY" --backbone-weights "$W/source/latest.pth" --seed "$SEED"
    quality "$1" "$W/splits/$2_scc$END/all.txt"
}

adapt() { # adapt NAME LABELS: split the labels and train UniMatch with them, from the source model
    local split="$W/splits/split_$1"
    run "$PYTHON" -m scripts.make_split --id-list-path "$W/splits/$2/all.txt" --root-path "$W" "${CLASSES[@]}" \
        --labeled-fraction 0.5 --out "$split"
    run "$PYTHON" train_unimatch.py --labeled-id-path "$split/labeled.txt" --unlabeled-id-path "$split/unlabeled.txt" \
        --val-id-path "$VAL_LIST" --root-path "$W" "${CLASSES[@]}" "${ADAPT[@]}" --init-checkpoint "$W/source/latest.pth" \
        --seed "$SEED" --save-path "$W/adapt_$1"
    validate "$1" "$W/adapt_$1/latest.pth"
}

seco() { # PSA, SCC and adaptation by the recipe $BY; the paper's rows and folders end in _paper
    psa "psa$END" "pix_$SAM$END" --vis 4
    scc "scc$END" "pix_$SAM$END"
    adapt "seco$END" "pix_$SAM${END}_scc$END"
}

# The rows of the paper's Tables 6 and 7 between the source model and SeCo, PSA that keeps the pixel label where no mask
# reaches (a departure, off by default), and the upper bound.
controls() {
    adapt pixel pix
    psa prompting "pix_$SAM${END}_only_prompting" --only-prompting
    adapt prompting "pix_$SAM${END}_only_prompting"
    psa alignment "pix_$SAM${END}_only_alignment" --only-alignment
    adapt alignment "pix_$SAM${END}_only_alignment"
    adapt "psa$END" "pix_$SAM$END"
    psa fill "pix_$SAM${END}_fill" --fill pixel
    adapt fill "pix_$SAM${END}_fill"
    scc scc_pixel pix
    adapt scc_pixel "pix_scc$END"
    # The upper bound sees what no method may see: ground truth of the target's training images.
    run "$PYTHON" train_unimatch.py --supervised --labeled-id-path "$TARGET_GT" --val-id-path "$VAL_LIST" --root-path "$W" \
        "${CLASSES[@]}" "${ADAPT[@]}" --init-checkpoint "$W/source/latest.pth" --seed "$SEED" --save-path "$W/adapt_bound"
    validate bound "$W/adapt_bound/latest.pth"
}

seed() { # everything of a seed: source model, pixel-level labels, the recipes that are asked for, the controls with the first
    W="$OUT/seed$SEED" MODELS="" LABELS=""
    mkdir -p "$W"
    ln -sfn "$(cd "$DATA" && pwd)" "$W/$(basename "$DATA")"
    run "$PYTHON" train_unimatch.py --supervised --labeled-id-path "$SOURCE_LIST" --root-path "$W" "${CLASSES[@]}" \
        "${SOURCE[@]}" --seed "$SEED" --save-path "$W/source"
    validate before "$W/source/latest.pth"
    run "$PYTHON" -m scripts.make_pseudo_labels --id-list-path "$TARGET_LIST" --root-path "$W" \
        --checkpoint "$W/source/latest.pth" --exp pix --out-list "$W/splits/pix/all.txt" "${CLASSES[@]}" "${PIXEL[@]}"
    quality pixel "$W/splits/pix/all.txt"
    for BY in ${RECIPE/both/release paper}; do
        END="_$BY" END="${END/_release/}"
        seco
        if [ "$CONTROLS" = 1 ] && [ "$BY $RECIPE" != "paper both" ]; then controls; fi
    done
}

report() { # tables, pictures and the page over all seeds, of the rows that have just run
    run "$PYTHON" -m scripts.lib.report "$OUT" --seeds $SEEDS --labels $LABELS --models $MODELS
    cat "$OUT/results.md"
    printf '\nThe same with pictures, in a browser: %s\n' "$OUT/index.html"
}
