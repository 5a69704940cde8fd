# The whole line for one seed, shared by toy.sh and camvid.sh, which source this file after setting:
#
#   OUT          folder of the run; everything of a seed goes to $OUT/seed<n>
#   RECIPE       release or paper; CONTROLS=1 adds the paper's ablation (Tables 6 and 7) and the upper bound
#   CLASSES      array: --class-num … options of the class set
#   SAM SOURCE PIXEL PSA SCC SPLIT ADAPT EVAL   arrays: what the task sets for each stage (its smaller sizes)
#   DATA_LINK    folder that the lists' image paths start from, linked into the seed's folder
#   source_list  target_list  target_gt  val_list   functions of the seed: where its lists are
#
# Every stage is skipped if the same command has succeeded before, so a stopped run goes on where it was.

cores() { "$PYTHON" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))'; }

# Pseudo-label quality against ground truth: a diagnostic, nothing that is trained sees it.
quality() { # quality NAME LIST
    stage "quality_$1" "$PYTHON" eval.py --labels "$2" --id-list-path "$(target_gt)" --root-path "$W" \
        "${CLASSES[@]}" --out "$W/eval/quality_$1"
}

validate() { # validate NAME CHECKPOINT
    stage "eval_$1" "$PYTHON" eval.py --checkpoint "$2" --id-list-path "$(val_list)" --root-path "$W" \
        "${CLASSES[@]}" "${EVAL[@]}" --out "$W/eval/$1"
}

adapt() { # adapt NAME LIST: split the list and train UniMatch with it, from the source model
    stage "split_$1" "$PYTHON" scripts/make_split.py --id-list-path "$2" --root-path "$W" "${CLASSES[@]}" \
        "${SPLIT[@]}" --out "$W/splits/split_$1"
    stage "adapt_$1" "$PYTHON" train_unimatch.py --labeled-id-path "$W/splits/split_$1/labeled.txt" \
        --unlabeled-id-path "$W/splits/split_$1/unlabeled.txt" --val-id-path "$(val_list)" --root-path "$W" \
        "${CLASSES[@]}" "${ADAPT[@]}" --init-checkpoint "$W/source/latest.pth" --seed "$SEED" --save-path "$W/adapt_$1"
    validate "$1" "$W/adapt_$1/latest.pth"
}

psa() { # psa NAME SUFFIX OPTION…: PSA of the pixel labels, its quality
    local name="$1" suffix="$2"
    shift 2
    stage "$name" "${LAUNCH[@]}" seco_sam.py --id-list-path "$W/splits/pix/all.txt" --root-path "$W" "${CLASSES[@]}" \
        "${PSA[@]}" "$@"
    quality "$name" "$W/splits/pix_$suffix/all.txt"
}

run_seed() {
    # As many processes as cores, one thread each: many small matrices keep one core busier than two.
    LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$(cores)")
    local sam="${SAM}" recipe_suffix="" scc_suffix="scc"
    W="$OUT/seed$SEED" STAGES="$OUT/seed$SEED/stages"
    mkdir -p "$W"
    ln -sfn "$(cd "$DATA_LINK" && pwd)" "$W/$(basename "$DATA_LINK")"
    if [ "$RECIPE" = paper ]; then
        recipe_suffix="_paper"
        scc_suffix="scc_paper"
    fi
    local aggregated="pix_$sam$recipe_suffix"

    stage source "$PYTHON" train_unimatch.py --supervised --labeled-id-path "$(source_list)" --root-path "$W" \
        "${CLASSES[@]}" "${SOURCE[@]}" --seed "$SEED" --save-path "$W/source"
    validate before "$W/source/latest.pth"

    stage pixel "$PYTHON" scripts/make_pseudo_labels.py --image-list "$(target_list)" --root-path "$W" \
        --checkpoint "$W/source/latest.pth" --exp pix --out-list "$W/splits/pix/all.txt" "${CLASSES[@]}" "${PIXEL[@]}"
    quality pixel "$W/splits/pix/all.txt"

    psa psa "$sam$recipe_suffix" --recipe "$RECIPE" --vis 4

    stage scc "$PYTHON" seco_scc.py --id-list-path "$W/splits/$aggregated/all.txt" --root-path "$W" "${CLASSES[@]}" \
        "${SCC[@]}" --recipe "$RECIPE" --backbone-weights "$W/source/latest.pth" --seed "$SEED"
    quality scc "$W/splits/${aggregated}_$scc_suffix/all.txt"

    adapt seco "$W/splits/${aggregated}_$scc_suffix/all.txt"

    if [ "$CONTROLS" = 1 ]; then
        psa alignment "$sam${recipe_suffix}_only_alignment" --recipe "$RECIPE" --only-alignment
        psa prompting "$sam${recipe_suffix}_only_prompting" --recipe "$RECIPE" --only-prompting
        adapt pixel "$W/splits/pix/all.txt"
        adapt psa "$W/splits/$aggregated/all.txt"
        adapt alignment "$W/splits/${aggregated}_only_alignment/all.txt"
        adapt prompting "$W/splits/${aggregated}_only_prompting/all.txt"
        # The upper bound sees what no method may see: ground truth of the target's training images.
        stage adapt_bound "$PYTHON" train_unimatch.py --supervised --labeled-id-path "$(target_gt)" \
            --val-id-path "$(val_list)" --root-path "$W" "${CLASSES[@]}" "${ADAPT[@]}" \
            --init-checkpoint "$W/source/latest.pth" --seed "$SEED" --save-path "$W/adapt_bound"
        validate bound "$W/adapt_bound/latest.pth"
    fi
}
