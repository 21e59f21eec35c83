#!/usr/bin/env bash
# Cross-data-set transfer (CoCoOp's setting): train on all classes of SOURCE, test there and on other data sets.
#
#   bash scripts/logo/cross_dataset.sh [SEED] [KEY VALUE …]      without a seed: 1, 2 and 3
#
# Environment as for base2new.sh, and SOURCE (imagenet), TARGETS (the others of the eleven).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

arguments "bash ${BASH_SOURCE[0]} [SEED] [KEY VALUE ...]" SEED -- "$@"
ELEVEN="imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"
transfer cross_dataset "${SOURCE:-imagenet}" "${TARGETS:-$ELEVEN}" vit_b16_ep50_ctxv1
