# Shared by the scripts, which source it. Reads the environment (see base2new.sh), changes to the repository's root and
# defines
#   fail MESSAGE, usage "USAGE"          exit with status 2
#   number NAME VALUE                    fail unless VALUE is a whole number of at least 1
#   need FILE                            fail unless FILE exists
#   arguments "USAGE" NAMES… -- WORDS…   parse the command line: set NAMES in their order, then SEEDS and OPTS
#   config DATASET CFG                   set CFG unless the environment does; both files must exist
#   finished DIR                         whether a run has results; damaged ones do not count
#   run DIR DATASET SUBSET [FLAGS …] -- [KEY VALUE …]   one run of train.py, skipped if finished, resumed if not
#   zero_shot                            whether TRAINER has nothing to train
#   learn DIR DATASET SUBSET             run with OPTS; for zero-shot CLIP, evaluate only
#   transfer KIND SOURCE TARGETS CFG     train on SOURCE, evaluate there and on the TARGETS
set -euo pipefail
unset CDPATH

HERE=$PWD
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)

fail() {
    echo "error: $1" >&2
    exit 2
}

usage() {
    echo "usage: $1" >&2
    exit 2
}

absolute() {
    case $1 in
        /*) echo "$1" ;;
        "~"/*) echo "$HOME/${1#"~"/}" ;;
        *) echo "$HERE/$1" ;;
    esac
}

DATA=$(absolute "${DATA:-$ROOT/data}")
OUTPUT=$(absolute "${OUTPUT:-$ROOT/output}")
FEATURES=${FEATURES-$OUTPUT/features.sqlite}
if [ -n "$FEATURES" ]; then FEATURES=$(absolute "$FEATURES"); fi # shared by all runs
BACKBONE=${BACKBONE:-}
if [ -f "$BACKBONE" ] || [[ $BACKBONE == "~"/* ]]; then BACKBONE=$(absolute "$BACKBONE"); fi
TRAINER=${TRAINER:-LoGoPrompt}
SHOTS=${SHOTS:-16}
ASKED_CFG=${CFG:-}
zero_shot() { [[ $TRAINER == ZeroshotCLIP* ]]; }
CFG_DIR=$TRAINER
if zero_shot || [ "$TRAINER" = LinearProbe ]; then CFG_DIR=CoOp; fi # they have no configs, as in CoOp
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=python; fi
fi
case $PYTHON in */*) PYTHON=$(absolute "$PYTHON") ;; esac
cd "$ROOT"

number() {
    case $2 in '' | 0* | *[!0-9]*) fail "$1 $2: a whole number of at least 1 is required" ;; esac
}

# A word with a dot is the first KEY of the overrides.
arguments() {
    local usage=$1 name
    shift
    local names=()
    while [ "$1" != -- ]; do names+=("$1"); shift; done
    shift
    SEEDS="1 2 3"
    for name in "${names[@]}"; do
        if [ "$name" = DATASET ]; then
            if [ $# -eq 0 ] || [[ $1 == *.* ]]; then usage "$usage"; fi
            printf -v "$name" %s "$1"
        elif [ $# -eq 0 ] || [[ $1 == *.* ]]; then
            break
        else
            number "$name" "$1"
            if [ "$name" = SEED ]; then SEEDS=$1; else printf -v "$name" %s "$1"; fi
        fi
        shift
    done
    OPTS=("$@")
}

config() {
    CFG=$2
    # the toy world has its own CLIP
    if [[ $1 == shapes* ]]; then CFG=tiny96_ep10_ctxv1; fi
    # CoCoOp's config names include M and the batch size; all have 10 epochs
    case $TRAINER/$CFG in
        CoCoOp/vit_b16*) CFG=vit_b16_c4_ep10_batch1_ctxv1 ;;
        CoCoOp/tiny96*) CFG=tiny96_c4_ep10_batch1_ctxv1 ;;
    esac
    CFG=${ASKED_CFG:-$CFG}
    need "configs/datasets/$1.yaml"
    need "configs/trainers/$CFG_DIR/$CFG.yaml"
    case $BACKBONE/$CFG in tiny/* | */tiny*) need toy/tiny_clip.pt ;; esac # not in a CoOp code base
}

need() {
    if [ ! -f "$1" ]; then fail "$ROOT/$1: no such file; check the data set, TRAINER and CFG"; fi
}

finished() { [ -f "$1/results.json" ] && "$PYTHON" trainers/prompting/results.py --finished "$1" > /dev/null; }

run() {
    local dir=$1 dataset=$2 subset=$3 flags=()
    shift 3
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    # Everything that the folder's name does not tell, so that an old result is never mistaken for a new one.
    local config="configs/trainers/$CFG_DIR/$CFG.yaml" data="configs/datasets/$dataset.yaml" asked
    asked="BACKBONE=$BACKBONE $data ($(cksum < "$data" | cut -d' ' -f1)) $config ($(cksum < "$config" | cut -d' ' -f1)) $*"
    # One script at a time, so that asked.txt belongs to the run in this folder. train.py has its own lock.
    mkdir -p "$dir" || exit 2
    if [ -w "$dir" ]; then
        exec 9> "$dir/.asked.lock"
        if command -v flock > /dev/null && ! flock -n 9; then
            fail "$dir: another run is writing into this folder; wait for its end or set OUTPUT"
        fi
    fi
    if [ -f "$dir/results.json" ] || [ -f "$dir/prompt_learner/checkpoint" ]; then
        if [ "$(cat "$dir/asked.txt" 2> /dev/null)" != "$asked" ]; then
            fail "$dir belongs to another run ($(cat "$dir/asked.txt" 2> /dev/null), now $asked): set OUTPUT or delete it"
        fi
    fi
    if finished "$dir"; then
        echo "finished before, skipped: $dir"
        return
    fi
    if [ ! -w "$dir" ]; then fail "$dir: this folder is not writable; set OUTPUT"; fi
    # Written under another name first, so that a full disk cannot truncate it.
    printf '%s\n' "$asked" 2> /dev/null > "$dir/.asked.tmp" || fail "$dir/asked.txt cannot be written: is the disk full?"
    mv -f "$dir/.asked.tmp" "$dir/asked.txt"
    "$PYTHON" train.py \
        --root "$DATA" \
        --seed "$SEED" \
        --trainer "$TRAINER" \
        ${BACKBONE:+--backbone "$BACKBONE"} \
        --dataset-config-file "$data" \
        --config-file "$config" \
        --output-dir "$dir" \
        ${flags[@]+"${flags[@]}"} \
        DATASET.NUM_SHOTS "$SHOTS" \
        DATASET.SUBSAMPLE_CLASSES "$subset" \
        TEST.FEATURES "$FEATURES" \
        "$@" 9>&-
    exec 9>&-
}

learn() {
    if zero_shot; then
        run "$1" "$2" "$3" --eval-only -- ${OPTS[@]+"${OPTS[@]}"}
    else
        run "$1" "$2" "$3" -- ${OPTS[@]+"${OPTS[@]}"}
    fi
}

transfer() {
    local kind=$1 source=$2 targets=$3 target folder common
    config "$source" "$4"
    for target in $targets; do need "configs/datasets/$target.yaml"; done
    for SEED in $SEEDS; do
        folder=$OUTPUT/$kind/from_$source
        common=shots_$SHOTS/$TRAINER/$CFG/seed$SEED
        learn "$folder/$source/$common" "$source" all
        for target in $targets; do
            if [ "$target" = "$source" ]; then continue; fi
            run "$folder/$target/$common" "$target" all \
                --eval-only --model-dir "$folder/$source/$common" -- ${OPTS[@]+"${OPTS[@]}"}
        done
    done
}
