# The whole line for one seed, shared by toy.sh and camvid.sh, which source this file after setting:
#
#   OUT          folder of the run; everything of a seed goes to $OUT/seed<n>
#   RECIPE       release, paper or both; CONTROLS=1 adds the paper's ablation (Tables 6 and 7) and the upper bound
#   CLASSES      array: --class-num … options of the class set
#   SAM          SAM's type
#   SOURCE PIXEL PSA SCC_RELEASE SCC_PAPER SPLIT ADAPT EVAL   arrays: what the task sets for each stage (its smaller sizes)
#   DATA_LINK    folder that the lists' image paths start from, linked into the seed's folder
#   source_list  target_list  target_gt  val_list   functions of the seed: where its lists are
#
# Every stage is skipped if it is done (scripts/lib/stage.py), so a stopped run goes on where it was.

# Pseudo-label quality against ground truth: a diagnostic, nothing that is trained sees it.
quality() { # quality NAME LIST
    stage "quality_$1" "$W/eval/quality_$1/metrics.json" -- "$PYTHON" eval.py --labels "$2" \
        --id-list-path "$(target_gt)" --root-path "$W" "${CLASSES[@]}" --out "$W/eval/quality_$1"
}

validate() { # validate NAME CHECKPOINT
    stage "eval_$1" "$W/eval/$1/metrics.json" -- "$PYTHON" eval.py --checkpoint "$2" \
        --id-list-path "$(val_list)" --root-path "$W" "${CLASSES[@]}" "${EVAL[@]}" --out "$W/eval/$1"
}

adapt() { # adapt NAME LIST: split the list and train UniMatch with it, from the source model
    local split="$W/splits/split_$1"
    stage "split_$1" "$split/labeled.txt" "$split/unlabeled.txt" -- "$PYTHON" -m scripts.make_split \
        --id-list-path "$2" --root-path "$W" "${CLASSES[@]}" "${SPLIT[@]}" --out "$split"
    stage "adapt_$1" "$W/adapt_$1" -- "$PYTHON" train_unimatch.py --labeled-id-path "$split/labeled.txt" \
        --unlabeled-id-path "$split/unlabeled.txt" --val-id-path "$(val_list)" --root-path "$W" \
        "${CLASSES[@]}" "${ADAPT[@]}" --init-checkpoint "$W/source/latest.pth" --seed "$SEED" --save-path "$W/adapt_$1"
    validate "$1" "$W/adapt_$1/latest.pth"
}

psa() { # psa NAME SUFFIX OPTION…: PSA of the pixel labels, its quality
    local name="$1" labels="pix_$2" weights
    weights="$(sam_file "$SAM")"
    if [ -z "$weights" ] && [ -d "${SAM_TYPE:-}" ]; then weights="$SAM_TYPE"; fi
    shift 2
    stage "$name" "$W/$labels" "$W/splits/$labels/all.txt" ${weights:+from "$weights"} -- "$PYTHON" seco_sam.py \
        --id-list-path "$W/splits/pix/all.txt" --root-path "$W" "${CLASSES[@]}" "${PSA[@]}" "$@"
    quality "$name" "$W/splits/$labels/all.txt"
}

scc() { # scc NAME LIST SUFFIX RECIPE: SCC of the labels in a list, its quality
    local options=("${SCC_RELEASE[@]}") list
    if [ "$4" = paper ]; then options=("${SCC_PAPER[@]}"); fi
    list="$(dirname "$2")_$3/$(basename "$2")"
    stage "$1" "$W/$(basename "$(dirname "$list")")" "$list" -- "$PYTHON" seco_scc.py --id-list-path "$2" \
        --root-path "$W" "${CLASSES[@]}" "${options[@]}" --recipe "$4" --backbone-weights "$W/source/latest.pth" --seed "$SEED"
    quality "$1" "$list"
}

# What a recipe's rows and folders are called, in the caller's row, suffix and corrected. The paper's carry its name.
recipe_names() { # recipe_names release|paper
    row="" suffix="$SAM" corrected=scc
    if [ "$1" = paper ]; then row=_paper suffix="${SAM}_paper" corrected=scc_paper; fi
}

# PSA, SCC and adaptation of one recipe.
run_recipe() { # run_recipe release|paper
    local row suffix corrected
    recipe_names "$1"
    psa "psa$row" "$suffix" --recipe "$1" --vis 4
    scc "scc$row" "$W/splits/pix_$suffix/all.txt" "$corrected" "$1"
    adapt "seco$row" "$W/splits/pix_${suffix}_$corrected/all.txt"
}

# The rows of the paper's Tables 6 and 7 between the source model and SeCo, PSA that keeps the pixel label where no mask
# reaches (a departure, off by default), and the upper bound.
run_controls() { # run_controls release|paper
    local row suffix corrected
    recipe_names "$1"
    adapt pixel "$W/splits/pix/all.txt"
    psa prompting "${suffix}_only_prompting" --recipe "$1" --only-prompting
    adapt prompting "$W/splits/pix_${suffix}_only_prompting/all.txt"
    psa alignment "${suffix}_only_alignment" --recipe "$1" --only-alignment
    adapt alignment "$W/splits/pix_${suffix}_only_alignment/all.txt"
    adapt "psa$row" "$W/splits/pix_$suffix/all.txt"
    psa fill "${suffix}_fill" --recipe "$1" --fill pixel
    adapt fill "$W/splits/pix_${suffix}_fill/all.txt"
    scc scc_pixel "$W/splits/pix/all.txt" "$corrected" "$1"
    adapt scc_pixel "$W/splits/pix_$corrected/all.txt"
    # The upper bound sees what no method may see: ground truth of the target's training images.
    stage adapt_bound "$W/adapt_bound" -- "$PYTHON" train_unimatch.py --supervised --labeled-id-path "$(target_gt)" \
        --val-id-path "$(val_list)" --root-path "$W" "${CLASSES[@]}" "${ADAPT[@]}" \
        --init-checkpoint "$W/source/latest.pth" --seed "$SEED" --save-path "$W/adapt_bound"
    validate bound "$W/adapt_bound/latest.pth"
}

run_seed() {
    W="$OUT/seed$SEED" STAGES="$OUT/seed$SEED/stages"
    mkdir -p "$W"
    ln -sfn "$(cd "$DATA_LINK" && pwd)" "$W/$(basename "$DATA_LINK")"

    stage source "$W/source" -- "$PYTHON" train_unimatch.py --supervised --labeled-id-path "$(source_list)" --root-path "$W" \
        "${CLASSES[@]}" "${SOURCE[@]}" --seed "$SEED" --save-path "$W/source"
    validate before "$W/source/latest.pth"

    stage pixel "$W/pix" "$W/splits/pix/all.txt" -- "$PYTHON" -m scripts.make_pseudo_labels \
        --id-list-path "$(target_list)" --root-path "$W" --checkpoint "$W/source/latest.pth" --exp pix \
        --out-list "$W/splits/pix/all.txt" "${CLASSES[@]}" "${PIXEL[@]}"
    quality pixel "$W/splits/pix/all.txt"

    if [ "$RECIPE" != paper ]; then run_recipe release; fi
    if [ "$RECIPE" != release ]; then run_recipe paper; fi
    if [ "$CONTROLS" = 1 ]; then
        if [ "$RECIPE" = paper ]; then run_controls paper; else run_controls release; fi
    fi
}

# Tables, pictures and the page over all seeds: made again if a stage has run since.
report() {
    STAGES="$OUT/stages"
    if [ "$RECIPE" != release ]; then
        stage sweep "$OUT/sweep.md" from "$OUT"/seed*/stages/scc_paper.json -- \
            "$PYTHON" -m scripts.dev.sweep_thresholds "$OUT" "${CLASSES[@]}"
    fi
    stage report "$OUT/results.md" from "$OUT"/seed*/stages/*.json -- \
        "$PYTHON" -m scripts.lib.report "$OUT" "${CLASSES[@]}"
    stage page "$OUT/index.html" from "$OUT/results.md" "$OUT"/seed*/stages/*.json -- "$PYTHON" -m scripts.lib.page "$OUT"
    printf '\n'
    cat "$OUT/results.md"
    printf '\nThe same with pictures, in a browser: %s\n' "$OUT/index.html"
}
