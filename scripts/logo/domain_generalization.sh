#!/usr/bin/env bash
# Domain generalization: train on all classes of SOURCE, evaluate there and on the same classes in the TARGETS.
#
#   bash scripts/logo/domain_generalization.sh [SEED] [KEY VALUE …]      without a seed: 1, 2 and 3
#   SOURCE=shapes TARGETS=shapes_shifted bash scripts/logo/domain_generalization.sh 1      an example
#
# The training on SOURCE is shared with cross_dataset.sh.
#
# Environment: as for base2new.sh, plus SOURCE (default imagenet) and TARGETS (default ImageNetV2, -Sketch, -A, -R).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

arguments "[SEED]" "$@"
transfer domain_generalization "${SOURCE:-imagenet}" \
    "${TARGETS:-imagenetv2 imagenet_sketch imagenet_a imagenet_r}" vit_b16_ep50_ctxv1
work
