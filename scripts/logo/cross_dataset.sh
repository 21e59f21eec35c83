#!/usr/bin/env bash
# Cross-dataset transfer, as in CoCoOp: train on all classes of SOURCE, evaluate there and on the TARGETS.
#
#   bash scripts/logo/cross_dataset.sh [SEED] [KEY VALUE …]      without a seed: 1, 2 and 3
#   SOURCE=shapes TARGETS=shapes_shifted bash scripts/logo/cross_dataset.sh 1      an example
#
# The training on SOURCE is shared with domain_generalization.sh.
#
# Environment: as for base2new.sh, plus SOURCE (default imagenet) and TARGETS (default the other ten data sets).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

arguments "[SEED]" "$@"
ELEVEN="imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"
transfer cross_dataset "${SOURCE:-imagenet}" "${TARGETS:-$ELEVEN}" vit_b16_ep50_ctxv1
work
