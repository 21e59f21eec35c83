#!/usr/bin/env bash
# The rows of Table 4, which the paper runs on ImageNet with RN50 and 16 shots: use, size and place of the
# visual prompts, and number of context vectors.
#
#   bash scripts/logo/ablation.sh DATASET [SEED] [KEY VALUE …]      without a seed: 1, 2 and 3
#   bash scripts/logo/ablation.sh shapes 1      an example
#
# Environment: as for base2new.sh. The runs of a row are in $OUTPUT/ablation/<row>/. All parts of the table share the
# row "shipped": selection, height 1/7, random place, and M = 16 with RN50.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh"

arguments "DATASET [SEED]" "$@"
if [ "$TRAINER" != LoGoPrompt ]; then fail "TRAINER $TRAINER: these are ablations of LoGoPrompt; unset TRAINER"; fi
if [ "$DATASET" = imagenet ]; then config imagenet rn50_ep50; else config "$DATASET" rn50; fi

OVERRIDES=(${OPTS[@]+"${OPTS[@]}"})
# row NAME KEY VALUE …
row() {
    local name=$1
    shift
    OPTS=("$@" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
    for SEED in $SEEDS; do
        learn "$OUTPUT/ablation/$name/$DATASET/shots_$SHOTS/$TRAINER/$CFG/seed$SEED" "$DATASET" all
    done
}

row shipped
for USE in none text_augmentation paired; do row "4a_$USE" TRAINER.LOGOPROMPT.VISUAL_PROMPT "$USE"; done
row 4b_1_14 TRAINER.LOGOPROMPT.BLOCK_HEIGHT 0.0714285714
row 4b_2_7 TRAINER.LOGOPROMPT.BLOCK_HEIGHT 0.2857142857
for M in 2 8; do row "4c_$M" TRAINER.LOGOPROMPT.CTX_INIT "" TRAINER.LOGOPROMPT.N_CTX "$M"; done
case $CFG in *ctxv1) row 4c_16 TRAINER.LOGOPROMPT.CTX_INIT "" TRAINER.LOGOPROMPT.N_CTX 16 ;; esac
for PLACE in top bottom; do row "4d_$PLACE" TRAINER.LOGOPROMPT.LOCATION "$PLACE"; done
work
