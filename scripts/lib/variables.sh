# The scripts are set by environment variables. This file makes mistakes in them an error, before anything is done.
#
#   source scripts/lib/variables.sh
#   variables "$0" SEEDS RECIPE OUT -- "$@"     the script's own variables and the arguments that it was given
#   one_of RECIPE release paper                 the value is one of those, or empty
#   numbers SEEDS 0 99                          whole numbers in this range, or empty
#
# Plain bash 3.2 without any tool, since nothing is set up yet.

# Every variable of every script. One that the script at hand does not know is an error, not a run without it.
KIT_VARIABLES=(BACKBONE_WEIGHTS CAMVID_ROOT CAMVID_URL CHECKPOINT CONTROLS DATA_ROOT DEVICE EXP GPUS OUT PROBABILITIES PYTHON RECIPE
               REHEARSE SAM_CHECKPOINT SAM_DIR SAM_TYPE SAM_URL SCC_WEIGHTS SEED SEEDS SMALLEST SPLITS STEM USE_SCC)

die() {
    echo "error: $*" >&2
    exit 2
}

# Exit code 0 if two different words differ by one letter, or by two neighbours that have changed places.
near() {
    local a="$1" b="$2"
    while [ -n "$a" ] && [ "${a:0:1}" = "${b:0:1}" ]; do a="${a:1}" b="${b:1}"; done
    while [ -n "$a" ] && [ -n "$b" ] && [ "${a: -1}" = "${b: -1}" ]; do a="${a%?}" b="${b%?}"; done
    { [ "${#a}" -le 1 ] && [ "${#b}" -le 1 ]; } || { [ "${#a}${#b}" = 22 ] && [ "${a:1}${a:0:1}" = "$b" ]; }
}

variables() { # variables SCRIPT NAME… -- ARGUMENT…
    local script known=(PYTHON) name other
    script="scripts/${1##*/}"
    shift
    while [ "$1" != -- ]; do known+=("$1") && shift; done
    shift
    if [ "${1:-}" = -h ] || [ "${1:-}" = --help ]; then
        while IFS= read -r name && [ "${name:0:1}" = "#" ]; do
            [ "${name:0:2}" = "#!" ] || { name="${name#\#}" && echo "${name# }"; }
        done < "$script"
        printf '\nEnvironment variables: %s\n' "${known[*]}"
        exit 0
    fi
    [ $# = 0 ] || die "$1: $script takes no such argument; bash $script --help"
    for name in $(compgen -e); do
        case " ${known[*]} " in *" $name "*) continue ;; esac
        case " ${KIT_VARIABLES[*]} " in
            *" $name "*) die "$name=${!name}: $script has no such variable, but ${known[*]}; unset $name" ;;
        esac
        for other in "${known[@]}"; do
            if near "$name" "$other"; then die "$name=${!name}: is $other meant? If not: unset $name"; fi
        done
    done
}

one_of() { # one_of NAME VALUE…
    local name="$1" value
    shift
    for value in "" "$@"; do [ "${!name:-}" != "$value" ] || return 0; done
    value="$*"
    die "$name=${!name}: give one of ${value// /, }"
}

numbers() { # numbers NAME LEAST MOST
    local value
    for value in ${!1:-}; do
        case "$value" in *[!0-9]*) value=x ;; esac
        if [ "$value" = x ] || [ "${#value}" -gt 10 ] || [ "$value" -lt "$2" ] || [ "$value" -gt "$3" ]; then
            die "$1=${!1}: give whole numbers from $2 to $3"
        fi
    done
}

# SAM_TYPE is a type that model/README.md lists: a short name, a name of the Hub or a folder.
sam_type() {
    case "${SAM_TYPE:-}" in */*) return ;; esac
    one_of SAM_TYPE tiny vit_t vit_b vit_l vit_h
}

sam_name() { # sam_name TYPE: what it is called in the names of outputs, as model/sam.py's output_name
    local name="${1%/}"
    name="${name##*/}"
    echo "${name//[^A-Za-z0-9_.+-]/_}"
}

# Where SAM's weights of a type are, if no other place is named: as the official files are called.
sam_file() { # sam_file TYPE
    case "$1" in
        tiny) echo model/sam_tiny.pth ;;
        vit_h) echo pretrained/sam_vit_h_4b8939.pth ;;
        vit_l) echo pretrained/sam_vit_l_0b3195.pth ;;
        vit_b) echo pretrained/sam_vit_b_01ec64.pth ;;
        vit_t) echo pretrained/mobile_sam.pt ;;
    esac
}
