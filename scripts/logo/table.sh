#!/usr/bin/env bash
# All rows of a table of the paper, and a report with the published numbers next to ours.
#
#   bash scripts/logo/table.sh TABLE [DATASET [SEED]] [KEY VALUE …]      without a seed: 1, 2 and 3
#   bash scripts/logo/table.sh 1 shapes 1      an example
#
# TABLE     1: base-to-new, 2: few-shot with 16 images per class, 3: domain generalization, 4: ablations,
#           figure3: few-shot with 1 to 16 images per class
# DATASET   default: "all" eleven for 1, 2 and figure3, imagenet for 3 (the source) and 4
#
# Environment: as for base2new.sh, plus TRAINERS (default: the table's), and TARGETS for table 3. Rows that fail are
# listed at the end; finished runs are skipped, so the same command continues.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

DATASET=all SEED=
arguments "TABLE [DATASET [SEED]]" "$@"
ELEVEN="imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"
SCRIPTS=$ROOT/scripts/logo
case $TABLE in
    1) ROWS="ZeroshotCLIP CoOp CoCoOp VPT DPT LoGoPrompt" ;;
    2) ROWS="CoOp VP+TP LoGoPrompt CLIPAdapter TipAdapter TipAdapterF LoGoPrompt+Adapter" ;;
    3) ROWS="ZeroshotCLIP CoOp CoCoOp VPT DPT LoGoPrompt" ;;
    4) ROWS=LoGoPrompt ;;
    figure3) ROWS="ZeroshotCLIP LinearProbe CoOp LoGoPrompt" ;;
    *) fail "TABLE $TABLE: choose 1, 2, 3, 4 or figure3" ;;
esac
ROWS=${TRAINERS:-$ROWS}
DATASETS=$DATASET
if [ "$DATASETS" = all ]; then
    case $TABLE in 3 | 4) DATASETS=imagenet ;; *) DATASETS=$ELEVEN ;; esac
fi
for ROW in $ROWS; do
    TRAINER=${ROW%+*}
    ours
done

export DATA OUTPUT FEATURES BACKBONE PYTHON CFG=$ASKED_CFG
FAILED=()
# row SCRIPT WORDS…: one row of one data set; a signal ends everything
row() {
    local status=0
    NUMBER=$((NUMBER + 1))
    printf '\n== row %s of %s, %s: %s %s\n' "$NUMBER" "$TOTAL" "$ROW" "$1" "${*:2}"
    bash "$SCRIPTS/$1" "${@:2}" ${SEED:+"$SEED"} ${OVERRIDES[@]+"${OVERRIDES[@]}"} || status=$?
    if [ "$status" -ge 128 ]; then exit "$status"; fi
    if [ "$status" -ne 0 ]; then FAILED+=("$ROW: $1 ${*:2}"); fi
}

NUMBER=0 TOTAL=$(($(wc -w <<< "$DATASETS") * $(wc -w <<< "$ROWS")))
if [ "$TABLE" = figure3 ]; then TOTAL=$((5 * TOTAL)); fi
trap 'echo "Interrupted in row $NUMBER of $TOTAL. The same command continues." >&2; exit 130' INT
RUNS=$OUTPUT/table$TABLE # of rows that differ in a key have folders of their own
for NAME in $DATASETS; do
    for ROW in $ROWS; do
        OVERRIDES=(${OPTS[@]+"${OPTS[@]}"})
        OUTPUT=$RUNS/$ROW
        case $ROW in
            *+TP) OVERRIDES+=(TRAINER.VP.TEXT_PROMPT learned) ;;
            *+Adapter) OVERRIDES+=(TRAINER.LOGOPROMPT.ADAPTER True) ;;
        esac
        TRAINER=${ROW%+*}
        export TRAINER OUTPUT
        case $TABLE in
            1) row base2new.sh "$NAME" ;;
            2) row few_shot.sh "$NAME" 16 ;;
            3) SOURCE=$NAME row domain_generalization.sh ;;
            4) row ablation.sh "$NAME" ;;
            figure3) for SHOTS in 1 2 4 8 16; do row few_shot.sh "$NAME" "$SHOTS"; done ;;
        esac
    done
done

if [ -f tools/report.py ]; then # not in a CoOp code base
    "$PYTHON" tools/report.py "$RUNS" --seeds $SEEDS --partial --out "$RUNS/report" || FAILED+=("the report")
fi
for LINE in ${FAILED[@]+"${FAILED[@]}"}; do echo "failed: $LINE" >&2; done
[ ${#FAILED[@]} -eq 0 ]
