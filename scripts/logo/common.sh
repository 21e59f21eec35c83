# Shared by the scripts, which source it: reads the environment (see base2new.sh), changes to the repository's root and
# defines functions. A script puts its runs into a queue (learn, run, pair) and then calls work.
set -euo pipefail
unset CDPATH

HERE=$PWD
ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.." && pwd)

fail() {
    echo "error: $1" >&2
    exit 2
}

# --help: the comment at the top of the script, and the variables that all scripts read
comment() { sed -nE '2,/^[^#]/s/^#( |$)//p' "$1"; }
for WORD in "$@"; do
    if [ "$WORD" = --help ] || [ "$WORD" = -h ]; then
        comment "$0"
        if ! grep -q "^# Environment:$" "$0"; then comment "$ROOT/scripts/logo/base2new.sh" | sed -n '/^Environment:$/,$p'; fi
        exit 0
    fi
    case $WORD in --*) fail "$WORD: no such option; bash $0 --help lists what the script takes" ;; esac
done

absolute() {
    case $1 in
        /*) echo "$1" ;;
        "~"/*) echo "$HOME/${1#"~"/}" ;;
        *) echo "$HERE/$1" ;;
    esac
}

ASKED_DATA=${DATA:-}
DATA=$(absolute "${DATA:-$ROOT/data}")
OUTPUT=$(absolute "${OUTPUT:-$ROOT/output}")
FEATURES=${FEATURES-$OUTPUT/features.sqlite}
if [ -n "$FEATURES" ]; then FEATURES=$(absolute "$FEATURES"); fi # shared by all runs
BACKBONE=${BACKBONE:-}
if [ -f "$BACKBONE" ] || [[ $BACKBONE == "~"/* ]]; then BACKBONE=$(absolute "$BACKBONE"); fi
case $BACKBONE in local-dir:*) BACKBONE=local-dir:$(absolute "${BACKBONE#local-dir:}") ;; esac
TRAINER=${TRAINER:-LoGoPrompt}
SHOTS=${SHOTS:-16}
ASKED_CFG=${CFG:-}
zero_shot() { [[ $TRAINER == ZeroshotCLIP* ]]; }
CFG_DIR=$TRAINER
if zero_shot || [ "$TRAINER" = LinearProbe ]; then CFG_DIR=CoOp; fi # they have no configs, as in CoOp
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$ROOT/.venv/bin/python" ]; then PYTHON=$ROOT/.venv/bin/python; else PYTHON=python; fi
fi
case $PYTHON in */*) PYTHON=$(absolute "$PYTHON") ;; esac
cd "$ROOT"

number() {
    case $2 in '' | 0* | *[!0-9]*) fail "$1 $2: a whole number of at least 1 is required" ;; esac
}

# arguments "NAMES" WORDS…: set NAMES in their order, the bracketed ones if they are given, then SEEDS and OPTS. A word
# with a dot is the first KEY of the overrides.
arguments() {
    local names name
    read -ra names <<< "$1"
    local usage="bash $0 $1 [KEY VALUE ...]"
    shift
    SEEDS="1 2 3"
    for name in "${names[@]}"; do
        if [ $# -eq 0 ] || [[ $1 == *.* ]]; then
            if [[ $name == "["* ]]; then break; fi
            echo "usage: $usage" >&2
            exit 2
        fi
        name=${name//[][]/}
        case $name in SEED | SHOTS | NCTX) number "$name" "$1" ;; esac
        printf -v "$name" %s "$1"
        if [ "$name" = SEED ]; then SEEDS=$1; fi
        shift
    done
    OPTS=("$@")
}

# config DATASET CFG: set CFG unless the environment does
config() {
    CFG=$2
    if [[ $1 == shapes* ]]; then CFG=tiny96_ep10_ctxv1; fi # the toy world has its own CLIP
    # CoCoOp's config names include M and the batch size; all have 10 epochs
    case $TRAINER/$CFG in
        CoCoOp/vit_b16*) CFG=vit_b16_c4_ep10_batch1_ctxv1 ;;
        CoCoOp/tiny96*) CFG=tiny96_c4_ep10_batch1_ctxv1 ;;
    esac
    CFG=${ASKED_CFG:-$CFG}
    # the toy world's models are tiny: more threads would wait for each other
    if [[ $CFG == tiny96* ]]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}; fi
    number SHOTS "$SHOTS"
    dataset "$1"
    if [[ $1 != shapes* ]] && [ ! -d "$DATA" ]; then # the toy world is drawn
        fail "DATA ${ASKED_DATA:-is not set, and $DATA}: no such folder; set DATA to the folder of the data sets"
    fi
    ours
    need "configs/trainers/$CFG_DIR/$CFG.yaml"
    case $BACKBONE/$CFG in tiny/* | */tiny*) need toy/tiny_clip.pt ;; esac # not in a CoOp code base
}

# ours: refuse a TRAINER that is no method of this plugin: it would train without writing results.json
ours() {
    local files names
    files=$(grep -lE "^from \.prompting\b" trainers/*.py)
    names=$(grep -hA1 "^@TRAINER_REGISTRY" $files | sed -n 's/^class \([A-Za-z0-9_]*\).*/\1/p' | tr '\n' ' ')
    if [[ " $names" != *" $TRAINER "* ]]; then fail "TRAINER $TRAINER: the scripts run ${names% } here; use one of them"; fi
}

dataset() {
    if [ ! -f "configs/datasets/$1.yaml" ]; then
        fail "data set $1: choose one of $(cd configs/datasets && echo *.yaml | sed 's/\.yaml//g') (configs/datasets/)"
    fi
}

need() {
    if [ ! -f "$1" ]; then fail "$ROOT/$1: no such file; check TRAINER and CFG"; fi
}

# ------------------------------------------------------------------------------------------------------ the queue
QUEUE=() # commands, of run and pair, with the values of the variables they read
DIRS=()  # of the runs
KINDS=() # train or test, of each
PAIRS=0
PRINTER=trainers/prompting/script_output.py

queue() {
    local values command
    printf -v values 'SEED=%q SHOTS=%q CFG=%q OPTS=(' "$SEED" "$SHOTS" "$CFG"
    if [ ${#OPTS[@]} -gt 0 ]; then printf -v values '%s%s' "$values" "$(printf '%q ' "${OPTS[@]}")"; fi
    printf -v command '%q ' "$@"
    QUEUE+=("$values); $command")
}

# run DIR DATASET SUBSET [FLAGS …]: queue one run of train.py with OPTS
run() {
    DIRS+=("$1")
    case " $* " in *" --eval-only "*) KINDS+=(test) ;; *) KINDS+=(train) ;; esac
    queue make_run "$@"
}

# learn DIR DATASET SUBSET: run; for zero-shot CLIP, evaluate only
learn() { if zero_shot; then run "$@" --eval-only; else run "$@"; fi; }

# pair BASE NEW: queue the lines with the accuracies of two runs, and H
pair() {
    PAIRS=$((PAIRS + 1))
    queue print_pair "$@"
}

# work: make the queued runs, and those that another script is making at the end, if they are still to be made then
work() {
    local waiting entry made
    NUMBER=0 STARTED=$SECONDS TRAINED=0 TRAINING=0 TESTED=0 TESTING=0
    trap 'interrupted 130' INT
    trap 'interrupted 143' TERM
    while [ ${#QUEUE[@]} -gt 0 ]; do
        waiting=() HELD=$'\n' made=0
        for entry in "${QUEUE[@]}"; do
            BUSY=
            eval "$entry"
            if [ -n "$BUSY" ]; then waiting+=("$entry"); else made=1; fi
        done
        QUEUE=(${waiting[@]+"${waiting[@]}"})
        if [ $made = 0 ]; then
            if [ -z "${TOLD:-}" ]; then echo "waiting for runs of another script:$HELD"; fi
            TOLD=1
            sleep 2
        fi
    done
    if [ ${#DIRS[@]} -gt 1 ] && [ $PAIRS -ne 1 ]; then "$PYTHON" "$PRINTER" table "${DIRS[@]}"; fi
}

interrupted() {
    local dir finished=0
    for dir in "${DIRS[@]}"; do if [ -f "$dir/results.json" ]; then finished=$((finished + 1)); fi; done
    echo "Interrupted: $finished of ${#DIRS[@]} runs are finished. The same command continues." >&2
    exit "$1"
}

# left: ", about 20 minutes left", from the time that runs took so far
left() {
    local i train=0 test=0 seconds
    for i in "${!DIRS[@]}"; do
        if [ ! -f "${DIRS[i]}/results.json" ]; then
            case ${KINDS[i]} in train) train=$((train + 1)) ;; *) test=$((test + 1)) ;; esac
        fi
    done
    if [ $train -gt 0 ] && [ $TRAINED = 0 ]; then return; fi
    if [ $((TRAINED + TESTED)) = 0 ]; then return; fi
    seconds=$((TRAINED ? train * TRAINING / TRAINED : 0))
    seconds=$((seconds + (TESTED ? test * TESTING / TESTED : 0)))
    if [ $seconds -lt 90 ]; then
        echo ", about a minute left"
    elif [ $seconds -lt 6000 ]; then
        echo ", about $(((seconds + 30) / 60)) minutes left"
    else
        echo ", about $(((seconds + 1800) / 3600)) hours left"
    fi
}

# asked DATASET: everything that the name of a run folder does not tell, so that an old result is never mistaken for a
# new one
asked() {
    local config="configs/trainers/$CFG_DIR/$CFG.yaml" data="configs/datasets/$1.yaml"
    echo "BACKBONE=$BACKBONE $data ($(cksum < "$data" | cut -d' ' -f1))" \
        "$config ($(cksum < "$config" | cut -d' ' -f1)) ${OPTS[*]-}"
}

# make_run DIR DATASET SUBSET [FLAGS …]: skipped if finished, resumed if not; sets BUSY if another script makes it, or
# the run whose model it evaluates
make_run() {
    local dir=$1 dataset=$2 subset=$3 asked started word
    shift 3
    for word in "$@"; do case $HELD in *$'\n'"$word"$'\n'*) BUSY=1 ;; esac; done
    # One script at a time, so that asked.txt belongs to the run in this folder. train.py has its own lock.
    mkdir -p "$dir" || exit 2
    if [ -z "$BUSY" ] && [ -w "$dir" ]; then
        exec 9> "$dir/.asked.lock"
        if command -v flock > /dev/null && ! flock -n 9; then BUSY=1; fi
    fi
    asked=$(asked "$dataset")
    if [ -f "$dir/results.json" ] || [ -f "$dir/prompt_learner/checkpoint" ] || { [ -n "$BUSY" ] && [ -f "$dir/asked.txt" ]; }; then
        if [ "$(cat "$dir/asked.txt" 2> /dev/null)" != "$asked" ]; then
            "$PYTHON" "$PRINTER" difference "$dir" "$asked" "$OUTPUT" >&2
            exit 2
        fi
    fi
    if [ -n "$BUSY" ]; then
        HELD+=$dir$'\n'
        return
    fi
    NUMBER=$((NUMBER + 1))
    if [ -f "$dir/results.json" ] && "$PYTHON" trainers/prompting/results.py --finished "$dir" > /dev/null; then
        echo "run $NUMBER of ${#DIRS[@]}: finished before, skipped: $dir"
        exec 9>&-
        return
    fi
    if [ ! -w "$dir" ]; then fail "$dir: this folder is not writable; set OUTPUT"; fi
    # Written under another name first, so that a full disk cannot truncate it.
    printf '%s\n' "$asked" 2> /dev/null > "$dir/.asked.tmp" || fail "$dir/asked.txt cannot be written: is the disk full?"
    mv -f "$dir/.asked.tmp" "$dir/asked.txt"
    echo "run $NUMBER of ${#DIRS[@]}$(left): $dir"
    started=$SECONDS
    "$PYTHON" train.py --root "$DATA" --seed "$SEED" --trainer "$TRAINER" ${BACKBONE:+--backbone "$BACKBONE"} \
        --dataset-config-file "configs/datasets/$dataset.yaml" --config-file "configs/trainers/$CFG_DIR/$CFG.yaml" \
        --output-dir "$dir" "$@" \
        DATASET.NUM_SHOTS "$SHOTS" DATASET.SUBSAMPLE_CLASSES "$subset" TEST.FEATURES "$FEATURES" \
        ${OPTS[@]+"${OPTS[@]}"} 9>&-
    exec 9>&-
    case " $* " in
        *" --eval-only "*) TESTED=$((TESTED + 1)) TESTING=$((TESTING + SECONDS - started)) ;;
        *) TRAINED=$((TRAINED + 1)) TRAINING=$((TRAINING + SECONDS - started)) ;;
    esac
}

print_pair() {
    case $HELD in *$'\n'"$1"$'\n'* | *$'\n'"$2"$'\n'*) BUSY=1 && return ;; esac
    "$PYTHON" trainers/prompting/results.py "$@"
}

# transfer KIND SOURCE TARGETS CFG: train on SOURCE, evaluate there and on the TARGETS. The two kinds share the training.
transfer() {
    local kind=$1 source=$2 targets=$3 target folder common own other trained
    config "$source" "$4"
    for target in $targets; do dataset "$target"; done
    case $kind in cross_dataset) other=domain_generalization ;; *) other=cross_dataset ;; esac
    for SEED in $SEEDS; do
        folder=$OUTPUT/$kind/from_$source
        common=shots_$SHOTS/$TRAINER/$CFG/seed$SEED
        own=$folder/$source/$common trained=$OUTPUT/$other/from_$source/$source/$common
        if [ -f "$own/prompt_learner/checkpoint" ] || [ ! -f "$trained/prompt_learner/checkpoint" ] ||
            [ "$(cat "$trained/asked.txt")" != "$(asked "$source")" ]; then
            trained=$own
        fi
        learn "$trained" "$source" all
        if [ "$trained" != "$own" ]; then run "$own" "$source" all --eval-only --model-dir "$trained"; fi
        for target in $targets; do
            if [ "$target" = "$source" ]; then continue; fi
            run "$folder/$target/$common" "$target" all --eval-only --model-dir "$trained"
        done
    done
}
