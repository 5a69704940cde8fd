# What the scripts share. Sourced in the repository's root. bash 3.2 and sed will do, since nothing is set up yet.

die() {
    echo "error: $*" >&2
    exit 2
}

arguments() { # arguments "$@": --help prints the script's head and the values that may be set; other arguments are an error
    local script="scripts/${0##*/}" caller="${BASH_SOURCE[1]}"
    case "${1:-}" in
        "") ;;
        -h | --help)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
            if [ "$caller" -ef "$script" ]; then caller=""; fi
            printf '\nEnvironment variables: PYTHON, an interpreter that has the packages, and, with their defaults:\n'
            sed -n 's/^\([A-Z_]*\)="${\1:-\([^}]*\)}" */  \1=\2  /p' "$script" ${caller:+"$caller"}
            exit 0
            ;;
        *) die "$1: $script takes no such argument; bash $script --help" ;;
    esac
}

accept() { # accept NAME PATTERN WORDS: the variable matches a regular expression as a whole
    [[ "${!1}" =~ ^($2)$ ]] || die "$1=${!1}: give $3"
}

one_of() { # one_of NAME VALUE…: the variable has one of these values
    local values="${*:2}"
    accept "$1" "${values// /|}" "one of ${values// /, }"
}

numbers() { # numbers NAME MOST: the variable has whole numbers of at most as many digits as MOST
    accept "$1" "[0-9]{1,${#2}}( [0-9]{1,${#2}})*" "whole numbers from 0 to $2"
}

sam_type() { # SAM_TYPE is a type that model/README.md lists: a short name, a name of the Hub or a folder
    if [[ "$SAM_TYPE" != */* ]]; then one_of SAM_TYPE tiny tiny_photo vit_t vit_b vit_l vit_h; fi
}

sam_name() { # sam_name TYPE: what it is called in the names of outputs, as model/sam.py's output_name
    local name="${1%/}"
    name="${name##*/}"
    echo "${name//[^A-Za-z0-9_.+-]/_}"
}

sam_file() { # sam_file TYPE: where its weights are, if no other place is named: as the official files are called
    case "$1" in
        tiny) echo model/sam_tiny.pth ;;
        tiny_photo) echo model/sam_tiny_photo.pth ;;
        vit_h) echo pretrained/sam_vit_h_4b8939.pth ;;
        vit_l) echo pretrained/sam_vit_l_0b3195.pth ;;
        vit_b) echo pretrained/sam_vit_b_01ec64.pth ;;
        vit_t) echo pretrained/mobile_sam.pt ;;
    esac
}

first_python() { # the first interpreter that will do
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "Python 3.10 or newer is missing (looked for python3, python and PYTHON); python.org or your system's packages have it"
}

show() { # show NAME…: the variables' values
    local name
    for name in "$@"; do printf '%s=%q ' "$name" "${!name}"; done
    echo
}

tell() { # tell COMMAND…: print it as it can be copied to a terminal
    printf '\n$'
    printf ' %q' "$@"
    echo
}

run() { # run COMMAND…: print it, then run it; each finds its own finished work
    tell "$@"
    "$@"
}
