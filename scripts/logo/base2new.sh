#!/usr/bin/env bash
# Base-to-new: train on the base classes, evaluate on the base and on the new classes, print both and H.
#
#   bash scripts/logo/base2new.sh DATASET SEED [KEY VALUE …]
#
# From the environment: DATA (folder of the data sets, default ./data of the repository), OUTPUT (default ./output),
# BACKBONE (name or path of CLIP weights, default: the config's), TRAINER (LoGoPrompt, CoOp or ZeroshotCLIP),
# CFG (file name in configs/trainers/<TRAINER>/ without .yaml), SHOTS (16), PYTHON. Relative paths count from where you are.
# A finished run (results.json is there) is skipped, an unfinished one is resumed.
set -euo pipefail
unset CDPATH

if [ $# -lt 2 ]; then
    echo "usage: bash ${BASH_SOURCE[0]} DATASET SEED [KEY VALUE ...]" >&2
    exit 2
fi
DATASET=$1
SEED=$2
shift 2
case $SEED in '' | 0 | *[!0-9]*)
    echo "error: seed $SEED: a whole number from 1 on is needed" >&2
    exit 2
    ;;
esac

HERE=$PWD
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)
absolute() {
    case $1 in
        /*) echo "$1" ;;
        "~"/*) echo "$HOME/${1#"~"/}" ;;
        *) echo "$HERE/$1" ;;
    esac
}

DATA=$(absolute "${DATA:-$ROOT/data}")
OUTPUT=$(absolute "${OUTPUT:-$ROOT/output}")
BACKBONE=${BACKBONE:-}
if [ -f "$BACKBONE" ] || [[ $BACKBONE == "~"/* ]]; then BACKBONE=$(absolute "$BACKBONE"); fi
TRAINER=${TRAINER:-LoGoPrompt}
SHOTS=${SHOTS:-16}
if [ -z "${CFG:-}" ]; then
    # CoOp's schedule: 200 epochs for 16 shots, 50 on ImageNet
    case $DATASET in
        imagenet) CFG=vit_b16_ep50_ctxv1 ;;
        shapes*) CFG=tiny96_ep10_ctxv1 ;; # the embedded world, with the embedded CLIP
        *) CFG=vit_b16_ctxv1 ;;
    esac
fi
CFG_DIR=$TRAINER
if [ "$TRAINER" = ZeroshotCLIP ]; then CFG_DIR=CoOp; fi # as in CoOp: it has no settings of its own
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=python; fi
fi
cd "$ROOT"
for file in "configs/datasets/$DATASET.yaml" "configs/trainers/$CFG_DIR/$CFG.yaml"; do
    if [ ! -f "$file" ]; then
        echo "error: $ROOT/$file: no such file; see DATASET, TRAINER and CFG" >&2
        exit 2
    fi
done

COMMON=$DATASET/shots_$SHOTS/$TRAINER/$CFG/seed$SEED
TRAIN_DIR=$OUTPUT/base2new/train_base/$COMMON
NEW_DIR=$OUTPUT/base2new/test_new/$COMMON
if [ "$TRAINER" = ZeroshotCLIP ]; then TRAIN_DIR=$OUTPUT/base2new/test_base/$COMMON; fi

# run DIR SUBSET [FLAGS …] -- [KEY VALUE …]
run() {
    local dir=$1 subset=$2 flags=()
    shift 2
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    # What the folder's name does not say, so that an old result is never taken for that of another command.
    local config="configs/trainers/$CFG_DIR/$CFG.yaml" asked
    asked="BACKBONE=$BACKBONE $config ($(cksum < "$config" | cut -d' ' -f1)) $*"
    if [ -f "$dir/results.json" ] || [ -f "$dir/prompt_learner/checkpoint" ]; then
        if [ "$(cat "$dir/asked.txt" 2> /dev/null)" != "$asked" ]; then
            echo "error: $dir belongs to another run ($(cat "$dir/asked.txt" 2> /dev/null), now $asked): set OUTPUT or delete it" >&2
            exit 2
        fi
    fi
    if [ -f "$dir/results.json" ]; then
        echo "finished before, skipped: $dir"
        return
    fi
    mkdir -p "$dir" || exit 2
    printf '%s\n' "$asked" > "$dir/asked.txt"
    "$PYTHON" train.py \
        --root "$DATA" \
        --seed "$SEED" \
        --trainer "$TRAINER" \
        ${BACKBONE:+--backbone "$BACKBONE"} \
        --dataset-config-file "configs/datasets/$DATASET.yaml" \
        --config-file "$config" \
        --output-dir "$dir" \
        ${flags[@]+"${flags[@]}"} \
        DATASET.NUM_SHOTS "$SHOTS" \
        DATASET.SUBSAMPLE_CLASSES "$subset" \
        "$@"
}

if [ "$TRAINER" = ZeroshotCLIP ]; then
    run "$TRAIN_DIR" base --eval-only -- "$@"
else
    run "$TRAIN_DIR" base -- "$@"
fi
run "$NEW_DIR" new --eval-only --model-dir "$TRAIN_DIR" -- "$@"

"$PYTHON" trainers/prompting/results.py "$TRAIN_DIR" "$NEW_DIR"
