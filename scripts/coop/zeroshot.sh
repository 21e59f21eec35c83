#!/usr/bin/env bash
# Zero-shot CLIP on a data set.
#
#   bash scripts/coop/zeroshot.sh DATASET CFG [KEY VALUE …]      CFG: rn50, rn101, vit_b32 or vit_b16
#   bash scripts/coop/zeroshot.sh shapes tiny96_ep10_ctxv1      an example
#
# Environment: as for main.sh, plus TRAINER (ZeroshotCLIP by default, or ZeroshotCLIP2 for the prompt ensemble).
TRAINER=${TRAINER:-ZeroshotCLIP} CFG=${2:-}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../logo/common.sh"

arguments "DATASET CFG" "$@"
if ! zero_shot; then fail "TRAINER $TRAINER: must be ZeroshotCLIP or ZeroshotCLIP2"; fi
SEED=1
config "$DATASET" "$CFG"
run "$OUTPUT/$TRAINER/$CFG/$DATASET" "$DATASET" all --eval-only
work
