#!/usr/bin/env bash
# Evaluate the runs of scripts/coop/main.sh on ImageNet (seeds 1, 2 and 3) on another data set.
#
#   bash scripts/coop/eval.sh DATASET CFG [KEY VALUE …]
#   SOURCE=shapes SHOTS=4 LOADEP= bash scripts/coop/eval.sh shapes_shifted tiny96_ep10_ctxv1      an example
#
# Environment: as for main.sh, plus the settings of those runs, with defaults: SOURCE (imagenet), SHOTS (16), NCTX (16),
# CSC (False), CTP (end), and LOADEP (epoch, 50; empty: the newest).
TRAINER=CoOp CFG=${2:-}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../logo/common.sh"

arguments "DATASET CFG" "$@"
SOURCE=${SOURCE:-imagenet} NCTX=${NCTX:-16} CSC=${CSC:-False} CTP=${CTP:-end} LOADEP=${LOADEP-50}
config "$DATASET" "$CFG"
SETTING=${CFG}_${SHOTS}shots/nctx${NCTX}_csc${CSC}_ctp${CTP}
KEYS=(TRAINER.COOP.N_CTX "$NCTX" TRAINER.COOP.CSC "$CSC" TRAINER.COOP.CLASS_TOKEN_POSITION "$CTP")
OPTS=("${KEYS[@]}" ${OPTS[@]+"${OPTS[@]}"})
for SEED in $SEEDS; do
    run "$OUTPUT/evaluation/$TRAINER/$SETTING/$DATASET/seed$SEED" "$DATASET" all \
        --eval-only --model-dir "$OUTPUT/$SOURCE/$TRAINER/$SETTING/seed$SEED" ${LOADEP:+--load-epoch "$LOADEP"}
done
work
