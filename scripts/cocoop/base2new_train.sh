#!/usr/bin/env bash
# CoCoOp's base-to-new, first half: train on the base classes. scripts/logo/base2new.sh makes the same runs.
#
#   bash scripts/cocoop/base2new_train.sh DATASET SEED [KEY VALUE …]
#   bash scripts/cocoop/base2new_train.sh shapes 1      an example
#
# Environment: as for scripts/logo/base2new.sh, but TRAINER defaults to CoCoOp.
TRAINER=${TRAINER:-CoCoOp}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../logo/common.sh"

arguments "DATASET SEED" "$@"
if [ "$DATASET" = imagenet ]; then config imagenet vit_b16_ep50_ctxv1; else config "$DATASET" vit_b16_ctxv1; fi
learn "$OUTPUT/base2new/train_base/$DATASET/shots_$SHOTS/$TRAINER/$CFG/seed$SEED" "$DATASET" base
work
