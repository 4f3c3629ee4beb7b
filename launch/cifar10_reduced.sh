#!/usr/bin/env bash
# The reduced CIFAR-10 runs of docs/results.md. Stop it and start it again at will.
# Usage: TFDS_DATA_DIR=DIR [DRY_RUN=1] bash launch/cifar10_reduced.sh FOLDER \
#   [--config.key=value ...]
# 16 runs; not timed as a whole.
set -eu
. "$(dirname "$0")/env.sh"
[ $# -ge 1 ] || refuse "usage: bash launch/cifar10_reduced.sh FOLDER [--config.key=value ...]"
folder=$1
shift
set_environment
one() {  # one NAME ARGUMENTS [FLAGS...]
  attempt "configs/cifar10.py:reduced,$2" "$folder/$1" "${@:3}"
}
# SimCLR under Noisy Alignment over seeds, each with its control, first: the rest is read against
# it.
for seed in 0 1 2; do
  one "simclr_noisy_alignment_$seed" "objective=simclr,seed=$seed" "$@"
done
# SSL-Backdoor's victims are measured against the same clean encoders, SimCLR's of seed 2.
one simclr_ssl_backdoor_2 objective=simclr,attack=ssl_backdoor,seed=2 "$@" \
  --config.control_from="$folder/simclr_noisy_alignment_2"
for objective in moco byol simsiam; do
  one "${objective}_noisy_alignment_0" "objective=$objective" "$@"
  one "${objective}_ssl_backdoor_0" "objective=$objective,attack=ssl_backdoor" "$@" \
    --config.control_from="$folder/${objective}_noisy_alignment_0"
done
# The distillation defense, and what training from scratch on the same clean images gives.
for seed in 0 1 2; do
  for defense in distill retrain; do
    one "simclr_noisy_alignment_$seed" "objective=simclr,seed=$seed,defense=$defense" "$@"
  done
done
name_failed
