#!/usr/bin/env bash
# Detection on scenes: poisoned rows of victims at three rates, backdoored encoders by DECREE, and
# vetting as somebody sees it who knows of no attack.
# Stop it and start it again at will: what is complete is skipped.
# Usage: [DRY_RUN=1] [NUMBERS="10 11 ..."] bash launch/clip_detection.sh VICTIMS FOLDER \
#   [rows|encoders|vetting] [--config.key=value ...]
# VICTIMS: the folder of `launch/clip_defenses.sh VICTIMS victims`, for rows and vetting. Without a
# part all are run, in this order; vetting needs what encoders makes.
# rows: density detectors for several reference batches and k, so that from less than one to 80
# poisons are expected in a batch; cosine filtering by the suspect and by the clean twin of another
# seed; BDetCLIP. encoders: 20 victims and their 20 clean twins, seeds 10 to 29, targets and
# triggers varied; thresholds come from ten other clean encoders, seeds 30 to 39, all of half the
# usual steps. At last python -m jax_cl_bd.reporting.detection says how well they are told apart; it
# leaves out victims with an excess below 0.5, which more NUMBERS (from 40 on) can replace. vetting:
# four of those encoders and their clean twins by the ten, then the rows of one victim and of three
# clean encoders.
set -eu
. "$(dirname "$0")/env.sh"
[ $# -ge 2 ] ||
  refuse "usage: bash launch/clip_detection.sh VICTIMS FOLDER [PART] [--config.key=value ...]"
victims=$1 folder=$2
shift 2
part=all
case ${1:-} in
  rows|encoders|vetting) part=$1; shift ;;
  ""|--*) ;;
  *) refuse "unknown part $1; one of rows, encoders, vetting" ;;
esac
flags=("$@")

set_environment

one() {  # one FOLDER ARGUMENTS [FLAGS...]
  attempt "configs/clip_scenes.py:$2" "$1" "${@:3}" ${flags[@]+"${flags[@]}"}
}
detect() {  # detect VICTIM NAME DEFENSE [FLAGS...]
  control_of "$victims" "$1"
  one "$folder/$1-$2" "defense=$3" --config.control=False ${control[@]+"${control[@]}"} "${@:4}" \
    "--config.victim=$victims/$1" --stages=defend,report
}
all_rows() {
  local victim batch k
  for victim in badnets_4_0 badnets_1_0 badnets_low_0 optimized_patch_4_0; do
    for batch in 128 512 2048; do
      for k in 16 64; do
        detect "$victim" "density_${batch}_$k" density "--config.defense.batch=$batch" \
          "--config.defense.k=$k"
      done
    done
    detect "$victim" cosine cosine_filter
    detect "$victim" cosine_clean cosine_filter \
      "--config.defense.scorer=$victims/badnets_4_1/control"
    detect "$victim" bdetclip bdetclip
  done
}
brief=(--config.train.steps=1200 --config.train.eval_every=0
  "--config.evals.probes=('zero_shot',)")
all_encoders() {  # a victim with its twin and DECREE on both: 215 s on one core
  local number attack judged=() calibrate=()
  for number in ${NUMBERS:-10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29}; do
    case $((number % 5)) in
      3) attack=optimized_patch ;;
      4) attack=blended ;;
      *) attack=badnets ;;
    esac
    one "$folder/encoder_$number" "$attack,target=$((number % 12)),seed=$number,defense=decree" \
      "${brief[@]}"
    judged+=("$folder/encoder_$number")
  done
  for number in 30 31 32 33 34 35 36 37 38 39; do
    one "$folder/clean_$number" "none,seed=$number,defense=decree" "${brief[@]}"
    calibrate+=("$folder/clean_$number")
  done
  name_failed  # of these every one is needed
  run "$PYTHON" -m jax_cl_bd.reporting.detection "${judged[@]}" --calibrate "${calibrate[@]}" \
    "--out=$folder/decree"
}
vet() {  # vet DEFENSE NAME VICTIM [FLAGS...]: status 1 after the report is suspicion, no failure
  local before=${#failed[@]}
  attempt "configs/$1.py" "$folder/$1-$2" "--config.victim=$3" "${@:4}" ${flags[@]+"${flags[@]}"}
  if [ -e "$folder/$1-$2/report/done.json" ]; then
    failed=(${failed[@]+"${failed[@]:0:$before}"})
  fi
}
# An encoder took 19 to 83 s on one core, and 455 s the first time, which measures the ten; rows of
# 8,000 pairs 126 to 252 s.
all_vetting() {
  local number name clean=""
  for number in 30 31 32 33 34 35 36 37 38 39; do
    clean="$clean${clean:+,}'$folder/clean_$number'"
  done
  for number in 10 12 13 14; do
    for name in encoder_$number encoder_$number/control; do
      vet vet_encoder "${name//\//_}" "$folder/$name" "--config.defense.clean_encoders=($clean)" \
        "--config.defense.calibration=$folder/calibration"
    done
  done
  vet vet_dataset badnets_4_0 "$victims/badnets_4_0"
  for number in 30 31 32; do
    vet vet_dataset "clean_$number" "$folder/clean_$number"
  done
}

case $part in all|rows) all_rows ;; esac
case $part in all|encoders) all_encoders ;; esac
case $part in all|vetting) all_vetting ;; esac
name_failed
