#!/usr/bin/env bash
# One config over seeds and choices, one run after another, or as the elements of a SLURM array.
# Stop it and start it again at will: what is complete is skipped.
# Usage: [DRY_RUN=1] [SEEDS="0 1 2"] bash launch/sweep.sh CONFIG FOLDER [key=value ...] \
#          [--config.key=value ...]
# Each word key=value is one choice: optim.lr=0.1 optim.lr=0.3 are two, and choices of different
# keys are crossed. A word with a colon before it is an argument of the config file, such as
# :badnets :blended or :objective=moco :objective=byol. Words with -- go to every run.
# A run that fails is named at the end; status 2 (bad input) or a signal ends the sweep.
# As an array (DRY_RUN=1 says how many): sbatch --array=0-11 [options] launch/sweep.sh CONFIG ...
# with the options of launch/slurm.sh, by which each element is run; then the report, by hand.
#SBATCH --job-name=jax_cl_bd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
set -eu
here=$(dirname "$0")
[ -e "$here/env.sh" ] || here=launch  # sbatch runs a copy of this file
[ -e "$here/env.sh" ] || { echo "error: no launch/env.sh in $PWD; submit from the repository" >&2
                           exit 2; }
. "$here/env.sh"
[ $# -ge 2 ] ||
  refuse "usage: bash launch/sweep.sh CONFIG FOLDER [key=value ...] [--config.key=value ...]"
config=$1 folder=$2
shift 2
keys=() choices=() flags=()  # keys in their order; all choices; what every run gets
for word in "$@"; do
  case $word in
    --*) flags+=("$word"); continue ;;
    :*=*|[a-z]*=*) key=${word%%=*} ;;
    :?*) key=: ;;
    *) refuse "$word is neither key=value nor :argument nor --config.key=value" ;;
  esac
  choices+=("$word")
  case " ${keys[*]-} " in *" $key "*) ;; *) keys+=("$key") ;; esac
done
key_of() { case $1 in *=*) echo "${1%%=*}" ;; *) echo : ;; esac; }

runs=("")  # the choices of each run, a line each
for key in ${keys[@]+"${keys[@]}"}; do
  crossed=()
  for run in "${runs[@]}"; do
    for choice in "${choices[@]}"; do
      [ "$(key_of "$choice")" != "$key" ] || crossed+=("$run$choice"$'\n')
    done
  done
  runs=("${crossed[@]}")
done
crossed=()
for run in "${runs[@]}"; do
  for seed in ${SEEDS:-0 1 2}; do crossed+=("${run}seed=$seed"); done
done
runs=("${crossed[@]}")

folders=()
for run in "${runs[@]}"; do
  name=$(printf '%s\n' "$run" | sed 's/^://' | tr '\n' '+' | tr -c 'A-Za-z0-9._=+-' _)
  name=${name%+}
  for other in ${folders[@]+"${folders[@]}"}; do
    [ "$other" != "$folder/$name" ] || refuse "two runs would share the folder $folder/$name"
  done
  folders+=("$folder/$name")
done
words_of() {  # words_of I: sets `words`, what a launcher is given for run I
  local choice file=$config
  words=()
  while IFS= read -r choice; do
    case $choice in
      :*) case $file in *:*) file=$file,${choice#:} ;; *) file=$file$choice ;; esac ;;
      *) words+=("--config.$choice") ;;
    esac
  done <<<"${runs[$1]}"
  words=("$file" "${folders[$1]}" "${words[@]}" ${flags[@]+"${flags[@]}"})
}
report=("$PYTHON" -m jax_cl_bd.report)

if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
  [ "$SLURM_ARRAY_TASK_ID" -lt "${#runs[@]}" ] ||
    refuse "SLURM_ARRAY_TASK_ID=$SLURM_ARRAY_TASK_ID, but there are ${#runs[@]} runs: --array=0-$((
      ${#runs[@]} - 1))"
  words_of "$SLURM_ARRAY_TASK_ID"
  echo "once all are complete: $(quoted "${report[@]}" "${folders[@]}" "--out=$folder/report")"
  exec bash "$here/slurm.sh" "${words[@]}"
fi

echo "${#runs[@]} runs; as a SLURM array: --array=0-$((${#runs[@]} - 1))"
complete=() failed=() child=""
trap '[ -z "$child" ] || kill -INT "$child"' INT
trap '[ -z "$child" ] || kill -TERM "$child"' TERM HUP
for ((i = 0; i < ${#runs[@]}; i++)); do
  words_of "$i"
  set -m  # a group of its own, so that Ctrl-C reaches it once, by the trap
  bash "$here/local.sh" "${words[@]}" </dev/null &
  child=$!
  set +m
  while kill -0 "$child" 2>/dev/null; do sleep 0.2 || :; done
  status=0
  wait "$child" || status=$?
  child=""
  case $status in
    0) complete+=("${folders[i]}") ;;
    2|130|143) exit "$status" ;;
    *) failed+=("${folders[i]}") ;;
  esac
done
[ "${#complete[@]}" -gt 0 ] || { echo "error: every run failed" >&2; exit 1; }
run "${report[@]}" "${complete[@]}" "--out=$folder/report"
[ "${#failed[@]}" -eq 0 ] || {
  echo "error: ${#failed[@]} runs failed and are not in the report: $(quoted "${failed[@]}")" >&2
  exit 1
}
