#!/usr/bin/env bash
# Domain generalization: train on all classes of SOURCE, evaluate there and on the same classes in the TARGETS.
#
#   bash scripts/logo/domain_generalization.sh [SEED] [KEY VALUE …]      without a seed: 1, 2 and 3
#
# Environment: as for base2new.sh, plus SOURCE (default imagenet) and TARGETS (default ImageNetV2, -Sketch, -A, -R).
# In the toy world: SOURCE=shapes TARGETS=shapes_shifted.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

arguments "[SEED]" "$@"
transfer domain_generalization "${SOURCE:-imagenet}" \
    "${TARGETS:-imagenetv2 imagenet_sketch imagenet_a imagenet_r}" vit_b16_ep50_ctxv1
