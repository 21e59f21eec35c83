#!/usr/bin/env bash
# CoOp's few-shot experiments with seeds 1, 2 and 3.
#
#   bash scripts/coop/main.sh DATASET CFG CTP NCTX SHOTS CSC [KEY VALUE …]
#
# CFG: a file in configs/trainers/CoOp/, without .yaml; CTP: class token position (end, middle or front); NCTX: number
# of context vectors; SHOTS: 1, 2, 4, 8 or 16; CSC: class-specific contexts (True or False). Environment: DATA, OUTPUT,
# BACKBONE and PYTHON as for scripts/logo/base2new.sh. Run folders are
# $OUTPUT/DATASET/CoOp/<CFG>_<SHOTS>shots/nctx<NCTX>_csc<CSC>_ctp<CTP>/seed<SEED>.
TRAINER=CoOp CFG=${2:-}
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../logo/common.sh"

if [ $# -lt 6 ]; then usage "bash ${BASH_SOURCE[0]} DATASET CFG CTP NCTX SHOTS CSC [KEY VALUE ...]"; fi
DATASET=$1 CTP=$3 NCTX=$4 SHOTS=$5 CSC=$6
shift 6
number NCTX "$NCTX"
number SHOTS "$SHOTS"
config "$DATASET" "$CFG"
for SEED in 1 2 3; do
    run "$OUTPUT/$DATASET/$TRAINER/${CFG}_${SHOTS}shots/nctx${NCTX}_csc${CSC}_ctp${CTP}/seed$SEED" "$DATASET" all -- \
        TRAINER.COOP.N_CTX "$NCTX" TRAINER.COOP.CSC "$CSC" TRAINER.COOP.CLASS_TOKEN_POSITION "$CTP" "$@"
done
