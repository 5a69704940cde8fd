# What the four tasks share: the values that are the same in all, what is missing, and the miniature of REHEARSE=1.
#
# Tolerance  1.5 points of mIoU on best and last-20 mean, 5 per class, wider where the log itself wobbles (compare_logs.py),
#            over the epochs that the log has.
# Exit code  0: every command ran and the run is within the tolerance of the shipped log (a rehearsal: every command ran),
#            1: it is not, 2: something is missing or wrong.

source scripts/lib/common.sh
REHEARSE="${REHEARSE:-0}"                                      # 1: everything in miniature
RECIPE="${RECIPE:-release}"                                    # of PSA and SCC: release or paper
USE_SCC="${USE_SCC:-1}"                                        # 0: adapt with PSA's labels
SEED="${SEED:-0}"                                              # of SCC and UniMatch
DEVICE="${DEVICE:-auto}"                                       # auto, cpu, cuda or cuda:N
GPUS="${GPUS:-}"                                               # processes; by default as many as share a batch evenly
STEM="${STEM:-deep}"                                           # of UniMatch's ResNet: deep or torchvision
PROBABILITIES="${PROBABILITIES:-}"                             # instead of CHECKPOINT: a folder of K x H x W arrays of any model
SAM_TYPE="${SAM_TYPE:-vit_h}"                                  # vit_h, vit_l, vit_b, vit_t, tiny, or a model of the Hub
SAM_CHECKPOINT="${SAM_CHECKPOINT:-}"                           # its weights; by default the official file in pretrained/
BACKBONE_WEIGHTS="${BACKBONE_WEIGHTS:-pretrained/resnet101.pth}" # of UniMatch: ImageNet weights
SCC_WEIGHTS="${SCC_WEIGHTS:-imagenet}"                         # of SCC: ImageNet weights
OUT="${OUT:-}"                                                 # folder of the run; by default runs/<task>
arguments "$@"
one_of REHEARSE 0 1
one_of RECIPE release paper
one_of USE_SCC 0 1
one_of STEM deep torchvision
numbers SEED 4294967295
sam_type
accept DEVICE 'auto|cpu|cuda|cuda:[0-9]{1,2}' "auto, cpu, cuda or cuda:N"

ready() { # stops with a list of what is missing, or makes the values ready and sets up the packages
    local python
    python="$(first_python)"
    SAM_CHECKPOINT="${SAM_CHECKPOINT:-$(sam_file "$SAM_TYPE")}" CACHE=() EXPECT=()
    if [ "$REHEARSE" = 1 ]; then
        miniature
    else
        OUT="${OUT:-runs/$TASK}"
        if [ "$DATA" != acdc ]; then LABELS=""; fi
        GPUS="$(export TITLE DATA DATA_ROOT PROBABILITIES LABELS CHECKPOINT CHECKPOINT_FROM SAM_TYPE SAM_CHECKPOINT \
            BACKBONE_WEIGHTS SCC_WEIGHTS USE_SCC DEVICE GPUS GLOBAL_BATCH; "$python" scripts/lib/preflight.py)"
    fi
    show OUT DATA_ROOT CHECKPOINT PROBABILITIES SAM_TYPE SAM_CHECKPOINT BACKBONE_WEIGHTS SCC_WEIGHTS RECIPE USE_SCC SEED DEVICE \
        GPUS STEM SPLITS EXP
    source scripts/lib/setup.sh
    LAUNCH=("$PYTHON") START=(--checkpoint "$CHECKPOINT") SUFFIX="" code=0
    if [ "$GPUS" -gt 1 ]; then LAUNCH+=(-m torch.distributed.run --standalone --nproc_per_node "$GPUS"); fi
    if [ -n "$PROBABILITIES" ]; then START=(--probabilities "$PROBABILITIES"); fi
    if [ "$RECIPE" = paper ]; then SUFFIX=_paper; fi
    PSA_EXP="${EXP}_$(sam_name "$SAM_TYPE")$SUFFIX"
    if [ "$REHEARSE" = 1 ]; then
        run "$PYTHON" -m scripts.lib.rehearsal_data --layout "$DATA" "${CLASSES[@]}" --out "$OUT/inputs" \
            --images "${EXPECT[@]:1}"
    fi
}

miniature() { # the values that are smaller in a rehearsal; the commands are the same
    OUT="${OUT:-runs/rehearse/$TASK}" GPUS=0 DEVICE=cpu
    echo "rehearsal of $TITLE, smaller than the real run: a few toy scenes in the official layout, half of them labeled; a" \
        "checkpoint in the authors' format with a random backbone and a fitted classifier; the tiny SAM; a few iterations"
    DATA_ROOT="$OUT/inputs/data" CHECKPOINT="$OUT/inputs/model_iter020000.pth" SPLITS="$OUT/splits" EXPECT=(--expect 2 1)
    TEST_SIZE=(--test-size 256 128) LABELED_FRACTION=0.5 CROP=129 GLOBAL_BATCH=1
    if [ "$DATA" = acdc ]; then EXPECT=(--expect 2 2 1) TEST_SIZE=(--test-size 96 54); fi
    SAM_TYPE=tiny SAM_CHECKPOINT=model/sam_tiny.pth BACKBONE_WEIGHTS=none SCC_WEIGHTS=none
    CACHE=(--proposal-cache "$OUT/inputs/proposals") # a second rehearsal with other labels is quick
    SCC=(--backbone resnet10 --iterations 4 --patch-size 64 128)
    ADAPT=(--backbone resnet10 --epochs 2 --lr 0.005 --lr-multi 1.0 --eval-every 2 --min-kept 5000 --workers 0)
}

compare() { # compare COMMAND…: the run beside the authors' log, to compare.txt too; `code` is 1 where it is out of the band
    tell "$@"
    PYTHONIOENCODING=utf-8 "$@" | tee "$OUT/compare.txt" || code=$?
    if [ "$code" -gt 1 ]; then exit "$code"; fi
}

finish() {
    if [ "$REHEARSE" = 0 ]; then exit "$code"; fi
    echo "rehearsal complete: every command of $TITLE ran. Its figures mean nothing: $OUT"
}
