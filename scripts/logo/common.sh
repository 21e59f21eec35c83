# Shared by the scripts, which source it: reads the environment (see base2new.sh), changes to the repository's root and
# defines functions.
set -euo pipefail
unset CDPATH

HERE=$PWD
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)

fail() {
    echo "error: $1" >&2
    exit 2
}

absolute() {
    case $1 in
        /*) echo "$1" ;;
        "~"/*) echo "$HOME/${1#"~"/}" ;;
        *) echo "$HERE/$1" ;;
    esac
}

ASKED_DATA=${DATA:-}
DATA=$(absolute "${DATA:-$ROOT/data}")
OUTPUT=$(absolute "${OUTPUT:-$ROOT/output}")
FEATURES=${FEATURES-$OUTPUT/features.sqlite}
if [ -n "$FEATURES" ]; then FEATURES=$(absolute "$FEATURES"); fi # shared by all runs
BACKBONE=${BACKBONE:-}
if [ -f "$BACKBONE" ] || [[ $BACKBONE == "~"/* ]]; then BACKBONE=$(absolute "$BACKBONE"); fi
case $BACKBONE in local-dir:*) BACKBONE=local-dir:$(absolute "${BACKBONE#local-dir:}") ;; esac
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

# arguments "NAMES" WORDS…: set NAMES in their order, the bracketed ones if they are given, then SEEDS and OPTS. A word
# with a dot is the first KEY of the overrides.
arguments() {
    local names name
    read -ra names <<< "$1"
    local usage="bash $0 $1 [KEY VALUE ...]"
    shift
    SEEDS="1 2 3"
    for name in "${names[@]}"; do
        if [ $# -eq 0 ] || [[ $1 == *.* ]]; then
            if [[ $name == "["* ]]; then break; fi
            echo "usage: $usage" >&2
            exit 2
        fi
        name=${name//[][]/}
        case $name in SEED | SHOTS | NCTX) number "$name" "$1" ;; esac
        printf -v "$name" %s "$1"
        if [ "$name" = SEED ]; then SEEDS=$1; fi
        shift
    done
    OPTS=("$@")
}

# config DATASET CFG: set CFG unless the environment does
config() {
    CFG=$2
    if [[ $1 == shapes* ]]; then CFG=tiny96_ep10_ctxv1; fi # the toy world has its own CLIP
    # CoCoOp's config names include M and the batch size; all have 10 epochs
    case $TRAINER/$CFG in
        CoCoOp/vit_b16*) CFG=vit_b16_c4_ep10_batch1_ctxv1 ;;
        CoCoOp/tiny96*) CFG=tiny96_c4_ep10_batch1_ctxv1 ;;
    esac
    CFG=${ASKED_CFG:-$CFG}
    need "configs/datasets/$1.yaml"
    if [[ $1 != shapes* ]] && [ ! -d "$DATA" ]; then # the toy world is drawn
        fail "DATA ${ASKED_DATA:-is not set, and $DATA}: no such folder; set DATA to the folder of the data sets"
    fi
    ours
    need "configs/trainers/$CFG_DIR/$CFG.yaml"
    case $BACKBONE/$CFG in tiny/* | */tiny*) need toy/tiny_clip.pt ;; esac # not in a CoOp code base
}

# ours: refuse a TRAINER that is no method of this plugin: it would train without writing results.json
ours() {
    local files names
    files=$(grep -lE "^from \.prompting\b" trainers/*.py)
    names=$(grep -hA1 "^@TRAINER_REGISTRY" $files | sed -n 's/^class \([A-Za-z0-9_]*\).*/\1/p' | tr '\n' ' ')
    if [[ " $names" != *" $TRAINER "* ]]; then fail "TRAINER $TRAINER: the scripts run ${names% } here; use one of them"; fi
}

need() {
    if [ ! -f "$1" ]; then fail "$ROOT/$1: no such file; check the data set, TRAINER and CFG"; fi
}

# run DIR DATASET SUBSET [FLAGS …]: one run of train.py with OPTS, skipped if finished, resumed if not
run() {
    local dir=$1 dataset=$2 subset=$3
    shift 3
    # Everything that the folder's name does not tell, so that an old result is never mistaken for a new one.
    local config="configs/trainers/$CFG_DIR/$CFG.yaml" data="configs/datasets/$dataset.yaml" asked
    asked="BACKBONE=$BACKBONE $data ($(cksum < "$data" | cut -d' ' -f1))"
    asked+=" $config ($(cksum < "$config" | cut -d' ' -f1)) ${OPTS[*]-}"
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
    if [ -f "$dir/results.json" ] && "$PYTHON" trainers/prompting/results.py --finished "$dir" > /dev/null; then
        echo "finished before, skipped: $dir"
        return
    fi
    if [ ! -w "$dir" ]; then fail "$dir: this folder is not writable; set OUTPUT"; fi
    # Written under another name first, so that a full disk cannot truncate it.
    printf '%s\n' "$asked" 2> /dev/null > "$dir/.asked.tmp" || fail "$dir/asked.txt cannot be written: is the disk full?"
    mv -f "$dir/.asked.tmp" "$dir/asked.txt"
    "$PYTHON" train.py --root "$DATA" --seed "$SEED" --trainer "$TRAINER" ${BACKBONE:+--backbone "$BACKBONE"} \
        --dataset-config-file "$data" --config-file "$config" --output-dir "$dir" "$@" \
        DATASET.NUM_SHOTS "$SHOTS" DATASET.SUBSAMPLE_CLASSES "$subset" TEST.FEATURES "$FEATURES" \
        ${OPTS[@]+"${OPTS[@]}"} 9>&-
    exec 9>&-
}

# learn DIR DATASET SUBSET: run; for zero-shot CLIP, evaluate only
learn() { if zero_shot; then run "$@" --eval-only; else run "$@"; fi; }

# transfer KIND SOURCE TARGETS CFG: train on SOURCE, evaluate there and on the TARGETS
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
            run "$folder/$target/$common" "$target" all --eval-only --model-dir "$folder/$source/$common"
        done
    done
}
