#!/usr/bin/env bash
# Repairs of image-text victims on scenes: victims, the oracle-guided repair, its baselines, and its
# stated limits. Stop it and start it again at will: what is complete is skipped.
# Usage: [DRY_RUN=1] [ATTACKS="badnets optimized_patch"] [SEEDS="0 1 2 3 4"] [SHARES="4 1 low"] \
#   bash launch/clip_defenses.sh FOLDER \
#   [victims|repair|baselines|limits|cleaning|ablations|cifar10] \
#   [--config.key=value ...]
# Without a part all are run, in this order; all but cifar10 need the victims. All 554 runs take
# about 35 hours on 2 cores, by the times of single ones below; within eight hours:
# SHARES=4 for the parts victims, repair and baselines, and the part limits.
# Shares: 4 % of 8,000 pairs (320 poisons), 1 % (80), low: 0.4 % of 100,000 (400). Optimised patches
# have seeds 0 to 2. Seed 0 has all rates of a repair, the others RATES, "(0.001,0.003)".
# Every encoder is also measured on the shifted split. A defense has a folder of its own, since a
# folder holds one of each name; limits that need no attack: the controls are clean models, and so
# are none_5 to none_9, so that false alarms can be counted over ten of them. Controls are defended
# by the repair with the labels as oracle alone. `cleaning`: each cleaning loss on badnets victims
# pretrained without and with the in-modality term, and pretraining that defends itself, seeds 1 to
# 3 (with the term the victim of seed 0 has an ASR below 0.9). `ablations`: the repair with one
# thing changed, at one rate, on seed 0 of badnets at 4 % with its clean twin and of optimized_patch
# at 1 %, in FOLDER/ablations. `cifar10`: one victim on real images (TFDS_DATA_DIR), its repairs and
# the baselines.
set -eu
. "$(dirname "$0")/env.sh"
[ $# -ge 1 ] || refuse "usage: bash launch/clip_defenses.sh FOLDER [PART] [--config.key=value ...]"
folder=$1
shift
part=all
case ${1:-} in
  victims|repair|baselines|limits|cleaning|ablations|cifar10) part=$1; shift ;;
  ""|--*) ;;
  *) refuse "unknown part $1;" \
       "one of victims, repair, baselines, limits, cleaning, ablations, cifar10" ;;
esac
file=configs/clip_scenes.py: flags=(--config.evals.other_test_split=shifted "$@")
rates=${RATES:-(0.001,0.003)}

set_environment

one() {  # one NAME ARGUMENTS [FLAGS...]
  attempt "$file$2" "$folder/$1" "${@:3}" ${flags[@]+"${flags[@]}"}
}
victim() {  # victim NAME ARGUMENTS [FLAGS...]
  control_of "$folder" "$1"
  one "$1" "$2,seed=${1##*_}" "${@:3}" ${control[@]+"${control[@]}"}
}
defend() {  # defend VICTIM NAME ARGUMENTS [FLAGS...]
  control_of "$folder" "$1"
  one "$1-$2" "$3" "${@:4}" ${control[@]+"${control[@]}"} "--config.victim=$folder/$1" \
    --stages=defend,report
}
swept() {  # the same for a repair with learning rates
  if [ "${1##*_}" = 0 ]; then defend "$@"; else defend "$@" "--config.defense.rates=$rates"; fi
}
each() {  # each COMMAND: for every attack, share and seed that is asked for
  local attack share seed
  for attack in ${ATTACKS:-badnets optimized_patch}; do
    for share in ${SHARES:-4 1 low}; do
      for seed in ${SEEDS:-0 1 2 3 4}; do
        [ "$attack" = optimized_patch ] && [ "$seed" -gt 2 ] || "$1" "${attack}_${share}_$seed"
      done
    done
  done
}
pairs_of() {  # pairs_of VICTIM: the size of the compact set that the repair made
  local found=$folder/$1-oracle/results.json
  if [ -e "$found" ]; then
    "$PYTHON" -c 'import json, sys
defenses = json.load(open(sys.argv[1]))["defenses"]
print(defenses["oracle_finetune"]["verdict"]["compact_set_pairs"])' "$found"
  elif [ -n "${DRY_RUN:-}" ]; then
    echo 1467  # of one victim; a run reads it from the repair's results
  else
    echo "$found is missing: run the part repair first" >&2
    return 1
  fi
}

# A victim with its control took 200 to 270 s on 2 cores, 7 to 9 core-minutes; one of share low,
# with five times the steps, 770 to 1,150 s on one core without its control.
one_victim() {
  case $1 in
    *_1_*) victim "$1" "${1%%_[14l]*}" --config.attack.poisons=80 ;;
    *_low_*) victim "$1" "${1%%_low*},low_rate" ;;
    *) victim "$1" "${1%%_[14l]*}" ;;
  esac
}
# Measured on one victim and its control, three rates, other work on the machine at times: 284 and
# 373 s with the labels as oracle, 753 s with a classifier.
one_repair() {
  swept "$1" oracle defense=oracle_finetune
  swept "$1" oracle_classifier defense=oracle_finetune,oracle=classifier --config.control=False
  local error
  if [ "${1##*_}" = 0 ]; then
    for error in 0.0 0.05 0.2; do
      swept "$1" "oracle_error_$error" defense=oracle_finetune \
        "--config.defense.oracle.error=$error" --config.control=False
    done
  fi
}
# Measured likewise: clean_clip on all clean pairs 607 s, par 323 s, without the control about half.
one_baseline() {
  local pairs action defense
  pairs=$(pairs_of "$1") || { failed+=("$folder/$1-clean_clip_few"); pairs=0; }
  for action in drop relabel; do
    swept "$1" "oracle_$action" defense=oracle_filter "--config.defense.action=$action" \
      --config.control=False
  done
  # Where the repair found nothing, its compact set is empty and there is nothing to compare with.
  [ "$pairs" = 0 ] || swept "$1" clean_clip_few defense=clean_clip "--config.defense.pairs=$pairs" \
    --config.control=False
  swept "$1" clean_clip defense=clean_clip --config.control=False
  swept "$1" clip_only defense=clean_clip --config.defense.in_modality=0.0 --config.control=False
  swept "$1" par defense=par --config.control=False
  for defense in cleaner_clip abd ubt invertune supervised; do
    swept "$1" "$defense" "defense=$defense" --config.control=False
  done
  for defense in fine_tune norm_only retrain; do
    defend "$1" "$defense" "defense=$defense" --config.control=False
  done
}
# 14 victims and 28 repairs at the costs above; clean models have no second model to repair.
all_limits() {
  local attack kind seed name
  for attack in blended wanet sig label_consistent natural; do
    victim "${attack}_4_0" "$attack"
  done
  for kind in several small beside all; do
    victim "adaptive_${kind}_4_0" "adaptive=$kind"
  done
  for seed in 5 6 7 8 9; do
    victim "none_$seed" none
  done
  for name in blended_4_0 wanet_4_0 sig_4_0 label_consistent_4_0 natural_4_0 \
      adaptive_several_4_0 adaptive_small_4_0 adaptive_beside_4_0 adaptive_all_4_0 \
      none_5 none_6 none_7 none_8 none_9; do
    swept "$name" oracle defense=oracle_finetune
    swept "$name" oracle_classifier defense=oracle_finetune,oracle=classifier --config.control=False
  done
}

# CLIP loss alone (clip_only), both terms (clean_clip) and PAR are baselines of badnets. The
# in-modality term alone lets the towers drift apart, so it has lower rates. Victims with the term
# took 474 s on one core, repairs at two rates 90 to 200 s; RoCLIP 761 s and SafeCLIP 2,202 s.
# Beside these two RoCLIP's augmentation alone, and CLIP undefended for as many steps.
all_cleaning() {
  local seed name kind
  for seed in ${SEEDS:-1 2 3}; do
    one "in_modality_4_$seed" "badnets,seed=$seed" --config.objective.in_modality=1.0 \
      --config.data.text_augment=eda --config.control=False
    swept "in_modality_4_$seed" clip_only defense=clean_clip --config.defense.in_modality=0.0 \
      --config.control=False
    for name in "badnets_4_$seed" "in_modality_4_$seed"; do
      defend "$name" in_modality_only defense=clean_clip --config.defense.cross_modal=False \
        "--config.defense.rates=(0.00001,0.0001)" --config.control=False
    done
    swept "in_modality_4_$seed" clean_clip defense=clean_clip --config.control=False
    swept "in_modality_4_$seed" par defense=par --config.control=False
    for kind in roclip safeclip; do
      one "${kind}_4_$seed" "badnets,objective=$kind,seed=$seed" --config.control=False
    done
    one "roclip_without_4_$seed" "badnets,objective=roclip,seed=$seed" --config.control=False \
      --config.objective.break_every=0
    one "longer_4_$seed" "badnets,seed=$seed" --config.control=False --config.train.steps=9600
  done
}
# What is changed before fine-tuning is also tried on the clean twin; what comes later is not.
all_ablations() {
  local name flag
  for name in badnets_4_0 optimized_patch_1_0; do
    ablate "$name" configured
    for flag in scan.evidence=crop scan.counterfactual=False scan.top=1 scan.top=10 \
        curate.rho=0.25 curate.rho_recurring=2.0 curate.correlation=0.5; do
      ablate "$name" "$flag" "--config.defense.$flag"
    done
    ablate "$name" scan.evidence=crop_0.25 --config.defense.scan.evidence=crop \
      --config.defense.scan.confident=0.25
    for flag in "curate.parts=('transplant','replay')" "curate.parts=('clean','replay')" \
        "curate.parts=('clean','transplant')" "curate.parts=('clean','relabel','replay')" \
        "curate.parts=('clean','relabel','transplant','replay')" curate.per_label=4 \
        curate.per_label=64 preserve=0.0 in_modality=1.0; do
      ablate "$name" "$(tr -d "()'" <<<"$flag" | tr , _)" "--config.defense.$flag"
    done
  done
}
ablate() {  # ablate VICTIM NAME [FLAG]
  local twin=(--config.control=False)
  case $1-$2 in badnets_4_0-configured|badnets_4_0-scan.*|badnets_4_0-*rho*) twin=() ;; esac
  control_of "$folder" "$1"
  one "ablations/$1-$2" defense=oracle_finetune "--config.defense.rates=(0.001,)" "${@:3}" \
    ${control[@]+"${control[@]}"} ${twin[@]+"${twin[@]}"} "--config.victim=$folder/$1" \
    --stages=defend,report
}
all_cifar10() {  # a victim and its control took 20 minutes on one core
  local file=configs/clip_cifar10.py:reduced, flags=("${flags[@]:1}")
  one cifar10_4_0 badnets,seed=0
  one_repair cifar10_4_0
  one_baseline cifar10_4_0
}

case $part in all|victims) each one_victim ;; esac
case $part in all|repair) each one_repair ;; esac
case $part in all|baselines) each one_baseline ;; esac
case $part in all|limits) all_limits ;; esac
case $part in all|cleaning) all_cleaning ;; esac
case $part in all|ablations) all_ablations ;; esac
case $part in all|cifar10) all_cifar10 ;; esac
name_failed
