# One of the three reported tasks, stage by stage; gta2cs.sh, synthia2cs.sh and gta2bdd.sh source this file after setting the
# task's values. Everything is run from the repository's root. Environment variables override paths and hardware:
#
#   DATA_ROOT        the target data, unpacked from the official downloads       OUT         folder of the run
#   CHECKPOINT       source of the starting labels: DT-ST's file, or ours        GPUS        processes (default: as many as fit)
#   PROBABILITIES    instead of it: a folder of K x H x W arrays of any model    RECIPE      release or paper
#   SAM_CHECKPOINT   SAM's weights, SAM_TYPE its type                            USE_SCC     0: adapt with PSA's labels
#   BACKBONE_WEIGHTS ImageNet weights of UniMatch's ResNet-101                   REHEARSE    1: everything in miniature
#   SCC_WEIGHTS      ImageNet weights of SCC's ResNet-101                        SEED, SPLITS, EXP
#
# Exit code: 0 all stages ran and the run is within the tolerance of the shipped log (a rehearsal: all stages ran), 1 it is
# not, 2 something is missing or wrong.

say() { printf '%s\n' "$*"; }
source scripts/lib/variables.sh
TASK_VARIABLES=(DATA_ROOT CHECKPOINT PROBABILITIES SAM_CHECKPOINT SAM_TYPE BACKBONE_WEIGHTS SCC_WEIGHTS OUT GPUS RECIPE USE_SCC
                REHEARSE SEED SPLITS EXP DEVICE STEM)

# ---------------------------------------------------------------------------------------------------------- preflight

missing=()
lacks() { # lacks WHAT WHERE-TO-GET-IT
    missing+=("$1" "$2")
}

count_images() { # count_images FOLDER SUFFIX: as prepare_data.py counts: links followed, hidden files not
    if [ ! -d "$1" ]; then
        echo 0
        return
    fi
    { find -L "$1" -mindepth 1 -name '.*' -prune -o -type f -iname "*$2" -print 2>/dev/null || true; } | wc -l | tr -d ' '
}

need_images() { # need_images FOLDER SUFFIX COUNT WHERE [GAPS]: up to GAPS files may be short
    local found
    found="$(count_images "$1" "$2")"
    if [ "$found" -gt "$3" ] || [ "$found" -lt "$(($3 - ${5:-0}))" ]; then
        lacks "$1: $found of $3 files *$2" "$4"
    elif [ "$found" -lt "$3" ]; then
        say "note: $1: $found of $3 files *$2; going on with these"
    fi
}

need_cityscapes() {
    local from="cityscapes-dataset.com (login)"
    need_images "$DATA_ROOT/leftImg8bit/train" _leftImg8bit.png 2975 "leftImg8bit_trainvaltest.zip of $from, unpacked in $DATA_ROOT"
    need_images "$DATA_ROOT/leftImg8bit/val" _leftImg8bit.png 500 "the same file"
    need_images "$DATA_ROOT/gtFine/val" _gtFine_labelIds.png 500 "gtFine_trainvaltest.zip of $from, unpacked in $DATA_ROOT (for evaluation)"
}

need_bdd() {
    local from="bdd-data.berkeley.edu (login), unpacked in $DATA_ROOT" images labels ending
    images="$DATA_ROOT/images/10k" labels="$DATA_ROOT/labels/sem_seg/masks" ending=.png
    if [ -d "$DATA_ROOT/bdd100k" ]; then
        images="$DATA_ROOT/bdd100k/images/10k" labels="$DATA_ROOT/bdd100k/labels/sem_seg/masks"
    fi
    for base in "$DATA_ROOT/seg" "$DATA_ROOT/bdd100k/seg"; do
        if [ -d "$base/images" ]; then images="$base/images" labels="$base/labels" ending=_train_id.png; fi
    done
    # Published with a few images less and a few without labels; prepare_data.py allows the same numbers.
    need_images "$images/train" .jpg 7000 "'10K Images' of $from" 70
    need_images "$images/val" .jpg 1000 "the same file" 10
    need_images "$labels/val" "$ending" 1000 "'Segmentation' of $from (for evaluation)" 10
}

need_inputs() {
    if [ -n "$PROBABILITIES" ]; then
        [ -d "$PROBABILITIES" ] || lacks "$PROBABILITIES: no such folder of probability arrays (PROBABILITIES)" \
            "write one K x H x W array per training image there, <image path>.npy"
    elif [ ! -f "$CHECKPOINT" ]; then
        lacks "$CHECKPOINT: the model that the starting labels come from" \
            "$CHECKPOINT_FROM; another file: CHECKPOINT=…; another model's probabilities: PROBABILITIES=<folder>"
    fi
    # (a model of the Hub has no file here; seco_sam.py says what it lacks)
    [ -z "$SAM_CHECKPOINT" ] || [ -e "$SAM_CHECKPOINT" ] || lacks "$SAM_CHECKPOINT: SAM's weights ($SAM_TYPE)" \
        "bash scripts/download.sh sam $SAM_TYPE (vit_t: model/README.md)"
    [ -f "$BACKBONE_WEIGHTS" ] || [ "$BACKBONE_WEIGHTS" = imagenet ] ||
        lacks "$BACKBONE_WEIGHTS: UniMatch's ImageNet ResNet-101 (deep stem)" \
            "the link 'ResNet-101' in the README of github.com/LiheYoung/UniMatch; or STEM=torchvision BACKBONE_WEIGHTS=imagenet"
    [ "$USE_SCC" = 0 ] || [ -f "$SCC_WEIGHTS" ] || [ "$SCC_WEIGHTS" = imagenet ] ||
        lacks "$SCC_WEIGHTS: ImageNet weights of SCC's ResNet-101" "SCC_WEIGHTS=imagenet (torchvision fetches them), or a .pth"
}

# GPUs that CUDA sees: nvidia-smi's, or those of CUDA_VISIBLE_DEVICES up to the first entry that is none of them.
gpus_found() {
    local IFS=', ' all=0 count=0 entry
    if command -v nvidia-smi >/dev/null 2>&1; then all="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"; fi
    if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "$all"
        return
    fi
    for entry in $CUDA_VISIBLE_DEVICES; do
        case "$entry" in
            GPU-* | MIG-*) ;;
            '' | *[!0-9]*) break ;;
            *) [ "$entry" -lt "$all" ] || break ;;
        esac
        count=$((count + 1))
    done
    echo "$((count < all ? count : all))"
}

# Sets GPUS: one for DEVICE=cuda:N, none on the CPU, else by default as many as can share the global batch evenly.
need_gpus() {
    local found n fit=0 fits="" most
    if [ "$DEVICE" = cpu ]; then
        GPUS=0
        return
    fi
    found="$(gpus_found)"
    if [ "$found" = 0 ]; then
        lacks "an NVIDIA GPU (nvidia-smi shows none, or CUDA_VISIBLE_DEVICES hides them)" \
            "the authors used four; on a CPU, try REHEARSE=1 bash $0"
        return
    fi
    case "$DEVICE" in
        cuda:*)
            [ "${DEVICE#cuda:}" -lt "$found" ] ||
                lacks "DEVICE=$DEVICE: the GPUs here are cuda:0 to cuda:$((found - 1))" "give one of these, or leave it out"
            [ "${GPUS:-1}" = 1 ] || lacks "GPUS=$GPUS with DEVICE=$DEVICE, which is one GPU" "leave one of the two out"
            GPUS=1
            return
            ;;
    esac
    for ((n = 1; n <= found; n++)); do
        [ $((GLOBAL_BATCH % n)) = 0 ] || continue
        fits="${fits:+$fits, }$n" most="$n"
        [ "${GPUS:-$n}" != "$n" ] || fit=1
    done
    if [ "$fit" = 0 ]; then
        lacks "GPUS=$GPUS: $found GPUs are here, and the processes share a global batch of $GLOBAL_BATCH evenly" \
            "give one of $fits, or leave it out"
    elif [ -z "${GPUS:-}" ] && [ "$most" != "$found" ]; then
        say "note: $most of $found GPUs are used; they share a global batch of $GLOBAL_BATCH evenly"
    fi
    GPUS="${GPUS:-$most}"
}

need_machine() {
    local free
    need_gpus
    free="$(df -Pk . | awk 'NR == 2 {print int($4 / 1000000)}')"
    [ "$free" -ge "$DISK_GB" ] || lacks "$DISK_GB GB of free disk here ($free are free)" "make room, or set OUT and DATA_ROOT elsewhere"
}

need_tools() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            return
        fi
    done
    lacks "Python 3.10 or newer" "python.org or your system's packages; the Python packages are then set up by this script"
}

preflight() {
    local i
    need_tools
    if [ "$REHEARSE" != 1 ]; then
        "need_$DATA"
        need_inputs
        need_machine
    fi
    if [ "${#missing[@]}" -gt 0 ]; then
        say "$TITLE: $((${#missing[@]} / 2)) things are missing; nothing was done." >&2
        for ((i = 0; i < ${#missing[@]}; i += 2)); do
            printf '  - %s\n      get it: %s\n' "${missing[i]}" "${missing[i + 1]}" >&2
        done
        exit 2
    fi
}

# ------------------------------------------------------------------------------------------------------------- stages

# The starting labels' own quality: every pixel's prediction on the validation set, at the network's input size.
before() {
    local exp="${EXP}_before"
    if [ -n "$PROBABILITIES" ]; then
        say "== before: skipped, PROBABILITIES has no arrays of the validation set; evaluate that model where it comes from"
        return
    fi
    stage before_labels "$DATA_ROOT/$exp" "$SPLITS/$exp/val.txt" -- "$PYTHON" -m scripts.make_pseudo_labels \
        --id-list-path "$VAL_LIST" --root-path "$DATA_ROOT" "${CLASSES[@]}" --checkpoint "$CHECKPOINT" --exp "$exp" --top-p 1 \
        "${TEST_SIZE[@]}" --out-list "$SPLITS/$exp/val.txt" --device "$DEVICE"
    stage before "$OUT/eval_before/metrics.json" -- "$PYTHON" eval.py --labels "$SPLITS/$exp/val.txt" \
        --id-list-path "$VAL_LIST" --root-path "$DATA_ROOT" "${CLASSES[@]}" --out "$OUT/eval_before"
}

run_task() {
    local labels before_scc suffix="" source=(--checkpoint "$CHECKPOINT") code=0
    [ -z "$PROBABILITIES" ] || source=(--probabilities "$PROBABILITIES")
    [ "$RECIPE" = release ] || suffix="_$RECIPE"

    stage data "$TRAIN_LIST" "$VAL_LIST" -- "$PYTHON" -m scripts.prepare_data "${PREPARE[@]}" --root-path "$DATA_ROOT" \
        --out "$SPLITS"
    before
    stage pixel "$DATA_ROOT/$EXP" "$SPLITS/$EXP/train.txt" from "${source[1]}" -- "${LAUNCH[@]}" \
        -m scripts.make_pseudo_labels --id-list-path "$TRAIN_LIST" --root-path "$DATA_ROOT" "${CLASSES[@]}" "${source[@]}" \
        --exp "$EXP" --preset dtst "${TEST_SIZE[@]}" --top-p "$TOP_P" --out-list "$SPLITS/$EXP/train.txt" --device "$DEVICE"
    labels="${EXP}_$(sam_name "$SAM_TYPE")$suffix"
    stage psa "$DATA_ROOT/$labels" "$SPLITS/$labels/train.txt" from "$SAM_TYPE" ${SAM_CHECKPOINT:+"$SAM_CHECKPOINT"} -- \
        "${LAUNCH[@]}" seco_sam.py \
        --id-list-path "$SPLITS/$EXP/train.txt" --root-path "$DATA_ROOT" "${CLASSES[@]}" --sam-type "$SAM_TYPE" \
        ${SAM_CHECKPOINT:+--sam-checkpoint "$SAM_CHECKPOINT"} --recipe "$RECIPE" --vis 8 --device "$DEVICE" \
        ${CACHE[@]+"${CACHE[@]}"}
    if [ "$USE_SCC" = 1 ]; then
        before_scc="$labels" labels="${labels}_scc$suffix"
        stage scc "$DATA_ROOT/$labels" "$SPLITS/$labels/train.txt" -- "${LAUNCH[@]}" seco_scc.py \
            --id-list-path "$SPLITS/$before_scc/train.txt" --root-path "$DATA_ROOT" "${CLASSES[@]}" --recipe "$RECIPE" \
            "${SCC[@]}" --backbone-weights "$SCC_WEIGHTS" --seed "$SEED" --device "$DEVICE"
    fi
    stage split "$SPLITS/$labels/labeled.txt" "$SPLITS/$labels/unlabeled.txt" -- "$PYTHON" -m scripts.make_split \
        --id-list-path "$SPLITS/$labels/train.txt" --root-path "$DATA_ROOT" "${CLASSES[@]}" \
        --labeled-fraction "$LABELED_FRACTION" --out "$SPLITS/$labels"
    stage adapt "$OUT/adapt" -- "${LAUNCH[@]}" train_unimatch.py --labeled-id-path "$SPLITS/$labels/labeled.txt" \
        --unlabeled-id-path "$SPLITS/$labels/unlabeled.txt" --val-id-path "$VAL_LIST" --root-path "$DATA_ROOT" \
        "${CLASSES[@]}" "${ADAPT[@]}" --backbone-weights "$BACKBONE_WEIGHTS" --eval-mode "$EVAL_MODE" --seed "$SEED" \
        --save-path "$OUT/adapt" --device "$DEVICE"
    stage after "$OUT/eval_after/metrics.json" -- "${LAUNCH[@]}" eval.py --checkpoint "$OUT/adapt/latest.pth" \
        --id-list-path "$VAL_LIST" --root-path "$DATA_ROOT" "${CLASSES[@]}" --mode "$EVAL_MODE" --crop-size "$CROP" \
        --out "$OUT/eval_after" --device "$DEVICE"
    say "" "== the run beside the authors' log"
    PYTHONIOENCODING=utf-8 "$PYTHON" -m scripts.compare_logs "$OUT/adapt" "$SHIPPED_LOG" \
        --picture "$OUT/pictures/compare.png" > "$OUT/compare.txt" || code=$?
    cat "$OUT/compare.txt"
    [ "$code" -le 1 ] || exit "$code"
    "$PYTHON" -m scripts.lib.page "$OUT"
    if [ "$REHEARSE" = 1 ]; then
        say "rehearsal complete: every stage of $TITLE ran. Its figures mean nothing: $OUT"
    else
        exit "$code"
    fi
}

# ---------------------------------------------------------------------------------------------------------- rehearsal

# The same stages on miniature inputs. Every value that is smaller than in the real run is set here, and only here.
rehearse() {
    DATA_ROOT="$OUT/inputs/data" CHECKPOINT="$OUT/inputs/model_iter020000.pth" SPLITS="$OUT/splits"
    SAM_TYPE=tiny SAM_CHECKPOINT=model/sam_tiny.pth BACKBONE_WEIGHTS=none SCC_WEIGHTS=none DEVICE=cpu GPUS=0
    local made scc=(--backbone resnet10 --iterations 4 --patch-size 64 128)
    local adapt=(--backbone resnet10 --epochs 2 --global-batch 1 --crop-size 129 --eval-every 2 --min-kept 5000 --workers 0)
    say "rehearsal of $TITLE, smaller than the real run in:" \
        "  data         2 + 1 toy scenes, half of them labeled, in the official layout (real: $IMAGES)" \
        "  checkpoint   DT-ST's format, random backbone, fitted classifier; input 256x128 (real: ${TEST_SIZE[1]}x${TEST_SIZE[2]})" \
        "  SAM          tiny (real: vit_h)" \
        "  SCC          ${scc[*]}, random weights" \
        "  UniMatch     ${adapt[*]}, random weights"
    TEST_SIZE=(--test-size 256 128)
    PREPARE=("${PREPARE[@]}" --expect 2 1) LABELED_FRACTION=0.5
    SCC=("${SCC[@]}" "${scc[@]}")
    ADAPT=("${ADAPT[@]}" "${adapt[@]}")  # of an option given twice the later value counts
    CROP=129
    CACHE=(--proposal-cache "$OUT/inputs/proposals")  # a second rehearsal with other labels is quick
    case "$DATA" in cityscapes) made=(leftImg8bit gtFine) ;; *) made=(images labels) ;; esac
    stage inputs "${made[@]/#/$DATA_ROOT/}" "$CHECKPOINT" -- "$PYTHON" -m scripts.lib.rehearsal_data --layout "$DATA" \
        "${CLASSES[@]}" --out "$OUT/inputs" --images 2 1
}

# --------------------------------------------------------------------------------------------------------------- main

main() { # main ARGUMENT… of the script
    variables "$0" "${TASK_VARIABLES[@]}" -- "$@"
    one_of RECIPE release paper
    one_of REHEARSE 0 1
    one_of USE_SCC 0 1
    sam_type
    case "${DEVICE:-auto}" in
        auto | cpu | cuda | cuda:[0-9] | cuda:[0-9][0-9]) ;;
        *) die "DEVICE=$DEVICE: give auto, cpu, cuda or cuda:N" ;;
    esac
    one_of STEM deep torchvision
    numbers SEED 0 4294967295
    REHEARSE="${REHEARSE:-0}" RECIPE="${RECIPE:-release}" USE_SCC="${USE_SCC:-1}" SEED="${SEED:-0}" DEVICE="${DEVICE:-auto}"
    SAM_TYPE="${SAM_TYPE:-vit_h}" PROBABILITIES="${PROBABILITIES:-}"
    SAM_CHECKPOINT="${SAM_CHECKPOINT:-$(sam_file "$SAM_TYPE")}"
    BACKBONE_WEIGHTS="${BACKBONE_WEIGHTS:-pretrained/resnet101.pth}" SCC_WEIGHTS="${SCC_WEIGHTS:-imagenet}"
    SPLITS="${SPLITS:-splits/$DATA}"
    preflight
    source scripts/lib/setup.sh
    LAUNCH=("$PYTHON") CACHE=()
    if [ "$REHEARSE" = 1 ]; then
        OUT="${OUT:-runs/rehearse/$TASK}" STAGES="${OUT:-runs/rehearse/$TASK}/stages"
        rehearse
    else
        OUT="${OUT:-runs/$TASK}" STAGES="${OUT:-runs/$TASK}/stages"
        if [ "$GPUS" -gt 1 ]; then LAUNCH=("$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$GPUS"); fi
    fi
    TRAIN_LIST="$SPLITS/train$LIST_SUFFIX.txt" VAL_LIST="$SPLITS/val$LIST_SUFFIX.txt"
    run_task
}
