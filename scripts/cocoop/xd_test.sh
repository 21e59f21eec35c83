#!/usr/bin/env bash
# CoCoOp's cross-dataset transfer, second half: evaluate the runs of xd_train.sh on another data set.
#
#   bash scripts/cocoop/xd_test.sh DATASET SEED [KEY VALUE …]
#   SOURCE=shapes bash scripts/cocoop/xd_test.sh shapes_shifted 1      an example
#
# Environment: as for xd_train.sh, plus LOADEP (epoch; default the newest).
TRAINER=${TRAINER:-CoCoOp}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../logo/common.sh"

arguments "DATASET SEED" "$@"
SOURCE=${SOURCE:-imagenet}
config "$SOURCE" vit_b16_ep50_ctxv1
dataset "$DATASET"
SETTING=$TRAINER/${CFG}_${SHOTS}shots
run "$OUTPUT/evaluation/$SETTING/$DATASET/seed$SEED" "$DATASET" all \
    --eval-only --model-dir "$OUTPUT/$SOURCE/$SETTING/seed$SEED" ${LOADEP:+--load-epoch "$LOADEP"}
work
