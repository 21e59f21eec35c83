#!/usr/bin/env bash
# CoCoOp's base-to-new, second half: evaluate the runs of base2new_train.sh on the new classes.
#
#   bash scripts/cocoop/base2new_test.sh DATASET SEED [KEY VALUE …]
#   bash scripts/cocoop/base2new_test.sh shapes 1      an example
#
# Environment: as for base2new_train.sh, plus SUB (new, base or all; default new), LOADEP (epoch; default the newest).
TRAINER=${TRAINER:-CoCoOp}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../logo/common.sh"

arguments "DATASET SEED" "$@"
if [ "$DATASET" = imagenet ]; then config imagenet vit_b16_ep50_ctxv1; else config "$DATASET" vit_b16_ctxv1; fi
SUB=${SUB:-new} COMMON=$DATASET/shots_$SHOTS/$TRAINER/$CFG/seed$SEED
run "$OUTPUT/base2new/test_$SUB/$COMMON" "$DATASET" "$SUB" \
    --eval-only --model-dir "$OUTPUT/base2new/train_base/$COMMON" ${LOADEP:+--load-epoch "$LOADEP"}
work
