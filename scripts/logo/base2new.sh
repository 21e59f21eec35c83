#!/usr/bin/env bash
# Base-to-new: train on the base classes, evaluate on the base and the new classes, print both accuracies and H.
#
#   bash scripts/logo/base2new.sh DATASET [SEED] [KEY VALUE …]      without a seed: 1, 2 and 3
#   TRAINER=CoOp bash scripts/logo/base2new.sh shapes 1 OPTIM.MAX_EPOCH 20      an example
#
# DATASET: a file in configs/datasets/, without .yaml. KEY VALUE: config keys, see docs/reference.md.
#
# Environment:
#   DATA       folder of the data sets (default: data/ in the repository)
#   OUTPUT     folder of the runs (default: output/ in the repository)
#   BACKBONE   name or path of CLIP weights (default: the config's)
#   TRAINER    LoGoPrompt (default), CoOp, CoCoOp, ZeroshotCLIP, …
#   CFG        file in configs/trainers/<TRAINER>/, without .yaml
#   SHOTS      training images per class (default: 16)
#   FEATURES   file that stores features of test images (default: features.sqlite in OUTPUT; empty: none)
#   PYTHON     interpreter (default: .venv/bin/python if it exists, else python)
# Relative paths are relative to the current folder. Finished runs are skipped, and unfinished ones are resumed. Scripts
# that are started at the same time share their runs.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

arguments "DATASET [SEED]" "$@"
# CoOp's schedule: 200 epochs for 16 shots, 50 on ImageNet
if [ "$DATASET" = imagenet ]; then config imagenet vit_b16_ep50_ctxv1; else config "$DATASET" vit_b16_ctxv1; fi

FIRST=train_base
if zero_shot; then FIRST=test_base; fi
for SEED in $SEEDS; do
    COMMON=$DATASET/shots_$SHOTS/$TRAINER/$CFG/seed$SEED
    BASE_DIR=$OUTPUT/base2new/$FIRST/$COMMON
    NEW_DIR=$OUTPUT/base2new/test_new/$COMMON
    learn "$BASE_DIR" "$DATASET" base
    run "$NEW_DIR" "$DATASET" new --eval-only --model-dir "$BASE_DIR"
    pair "$BASE_DIR" "$NEW_DIR"
done
work
