#!/usr/bin/env bash
# CoOp's few-shot experiments with seeds 1, 2 and 3.
#
#   bash scripts/coop/main.sh DATASET CFG CTP NCTX SHOTS CSC [KEY VALUE …]
#   bash scripts/coop/main.sh shapes tiny96_ep10_ctxv1 end 16 4 False      an example
#
# CFG: file in configs/trainers/CoOp/, without .yaml; CTP: class token position (end, middle or front); NCTX: number of
# context vectors; SHOTS: 1, 2, 4, 8 or 16; CSC: class-specific contexts (True or False). Environment: DATA, OUTPUT,
# BACKBONE and PYTHON as for scripts/logo/base2new.sh. Run folders are named as in CoOp.
TRAINER=CoOp CFG=${2:-}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../logo/common.sh"

arguments "DATASET CFG CTP NCTX SHOTS CSC" "$@"
config "$DATASET" "$CFG"
KEYS=(TRAINER.COOP.N_CTX "$NCTX" TRAINER.COOP.CSC "$CSC" TRAINER.COOP.CLASS_TOKEN_POSITION "$CTP")
OPTS=("${KEYS[@]}" ${OPTS[@]+"${OPTS[@]}"})
for SEED in $SEEDS; do
    run "$OUTPUT/$DATASET/$TRAINER/${CFG}_${SHOTS}shots/nctx${NCTX}_csc${CSC}_ctp${CTP}/seed$SEED" "$DATASET" all
done
work
