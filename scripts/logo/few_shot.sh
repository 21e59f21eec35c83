#!/usr/bin/env bash
# Few-shot classification: train on 1 to 16 images of every class, evaluate on the test images.
#
#   bash scripts/logo/few_shot.sh DATASET [SHOTS [SEED]] [KEY VALUE …]      default: 1, 2, 4, 8, 16 shots; seeds 1, 2, 3
#   bash scripts/logo/few_shot.sh shapes 4 1      an example
#
# Environment: as for base2new.sh; SHOTS may hold several numbers.
ALL_SHOTS=${SHOTS:-1 2 4 8 16}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

SHOTS=$ALL_SHOTS
arguments "DATASET [SHOTS [SEED]]" "$@"
for SHOTS in $SHOTS; do
    # CoOp's schedule
    case $DATASET/$SHOTS in
        imagenet/* | */1) config "$DATASET" rn50_ep50 ;;
        */2 | */4) config "$DATASET" rn50_ep100 ;;
        *) config "$DATASET" rn50 ;;
    esac
    for SEED in $SEEDS; do
        learn "$OUTPUT/few_shot/$DATASET/shots_$SHOTS/$TRAINER/$CFG/seed$SEED" "$DATASET" all
    done
done
work
