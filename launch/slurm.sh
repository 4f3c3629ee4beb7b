#!/usr/bin/env bash
# SLURM: one task per GPU, all GPUs of a node visible to each of its tasks, which is what JAX's
# detection of SLURM takes for granted (github.com/jax-ml/jax/issues/28194: no --gpus-per-task).
# Usage, in the folder of the repository, which all nodes share, as they do WORKDIR:
#   sbatch [--nodes=4 --time=24:00:00 ...] launch/slurm.sh CONFIG WORKDIR [--config.key=value ...]
# On nodes with four GPUs: sbatch --gres=gpu:4 --ntasks-per-node=4; on CPUs: --gres=none
# --ntasks-per-node=1. DRY_RUN=1 bash launch/slurm.sh ... prints the command of a job.
# Five minutes before the time limit the tasks get SIGTERM, save and stop; the job is then put back
# into the queue, as after all that broke, at most MAX_RESTARTS (20) times: SLURM_RESTART_COUNT
# counts them. Not after status 0 (done), 2 (bad input) or scancel. A vetting that finds something
# ends with 1: give it MAX_RESTARTS=0.
#SBATCH --job-name=jax_cl_bd
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --requeue
#SBATCH --signal=TERM@300
#SBATCH --open-mode=append
set -eu
# sbatch runs a copy of this file, so its place says nothing.
[ -e launch/env.sh ] || { echo "error: no launch/env.sh in $PWD; submit from the repository" >&2
                          exit 2; }
. launch/env.sh
[ $# -ge 2 ] ||
  refuse "usage: sbatch [options] launch/slurm.sh CONFIG WORKDIR [--config.key=value ...]"
set_environment
config=$1 workdir=$2
shift 2
most=${MAX_RESTARTS:-20} count=${SLURM_RESTART_COUNT:-0}
whole MAX_RESTARTS "$most"

# srun ends with the highest status of all tasks, so a task with status 2 must not have the others
# killed at once (128 + 9 is more): they notice and end by themselves. --wait=0: task 0 evaluates
# and defends once the others, done with pretraining, have ended.
command=(srun --kill-on-bad-exit=0 --wait=0)
# Since SLURM 22.05 srun no longer takes this from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || command+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
command+=("$PYTHON" -m jax_cl_bd "--config=$config" "--workdir=$workdir" "$@")

cancelled=""
trap 'cancelled=1' TERM  # of scancel and pre-emption; --signal reaches the tasks alone
status=0
run "${command[@]}" || status=$?
if [ -n "${DRY_RUN:-}" ]; then
  echo "# then, after any status but 0 and 2, at most $most times: scontrol requeue \$SLURM_JOB_ID"
  exit 0
fi
case $status in 0|2) exit "$status" ;; esac
if [ -n "$cancelled" ]; then
  echo "launch/slurm.sh: stopped with status $status by a signal to the job, not requeued" >&2
elif [ -z "${SLURM_JOB_ID:-}" ] || [ "$count" -ge "$most" ]; then
  echo "launch/slurm.sh: status $status after $count of $most restarts, not requeued; the same" \
    "sbatch command goes on from the last checkpoint" >&2
else
  echo "launch/slurm.sh: status $status; restart $((count + 1)) of $most" >&2
  run scontrol requeue "$SLURM_JOB_ID" && sleep 60  # ended by SLURM, with the job's place kept
fi
exit "$status"
