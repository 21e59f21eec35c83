#!/usr/bin/env bash
# Base-to-new: train on the base classes, evaluate on the base and on the new classes, print both and H.
#
#   bash scripts/logo/base2new.sh DATASET [SEED] [KEY VALUE …]      without a seed: 1, 2 and 3
#
# From the environment: DATA (folder of the data sets, default ./data of the repository), OUTPUT (default ./output),
# BACKBONE (name or path of CLIP weights, default: the config's), TRAINER (LoGoPrompt, CoOp, ZeroshotCLIP, …),
# CFG (file name in configs/trainers/<TRAINER>/ without .yaml), SHOTS (16), PYTHON. Relative paths count from where you
# are. A finished run (results.json is there) is skipped, an unfinished one is resumed.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

arguments "bash ${BASH_SOURCE[0]} DATASET [SEED] [KEY VALUE ...]" DATASET SEED -- "$@"
# CoOp's schedule: 200 epochs for 16 shots, 50 on ImageNet
if [ "$DATASET" = imagenet ]; then config imagenet vit_b16_ep50_ctxv1; else config "$DATASET" vit_b16_ctxv1; fi

FIRST=train_base
if zero_shot; then FIRST=test_base; fi
for SEED in $SEEDS; do
    COMMON=$DATASET/shots_$SHOTS/$TRAINER/$CFG/seed$SEED
    BASE_DIR=$OUTPUT/base2new/$FIRST/$COMMON
    NEW_DIR=$OUTPUT/base2new/test_new/$COMMON
    learn "$BASE_DIR" "$DATASET" base
    run "$NEW_DIR" "$DATASET" new --eval-only --model-dir "$BASE_DIR" -- ${OPTS[@]+"${OPTS[@]}"}
    "$PYTHON" trainers/prompting/results.py "$BASE_DIR" "$NEW_DIR"
done
