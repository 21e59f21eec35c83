#!/usr/bin/env bash
# CoCoOp's cross-dataset transfer, first half: train on all classes of ImageNet.
#
#   bash scripts/cocoop/xd_train.sh SEED [KEY VALUE …]
#   SOURCE=shapes bash scripts/cocoop/xd_train.sh 1      an example
#
# Environment: as for base2new_train.sh, plus SOURCE (default imagenet).
TRAINER=${TRAINER:-CoCoOp}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../logo/common.sh"

arguments "SEED" "$@"
SOURCE=${SOURCE:-imagenet}
config "$SOURCE" vit_b16_ep50_ctxv1
learn "$OUTPUT/$SOURCE/$TRAINER/${CFG}_${SHOTS}shots/seed$SEED" "$SOURCE" all
work
