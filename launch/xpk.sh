#!/usr/bin/env bash
# TPU slices of a GKE cluster that xpk made (github.com/AI-Hypercomputer/xpk).
# Usage: NAME=... CLUSTER=... TYPE=... IMAGE=... bash launch/xpk.sh CONFIG WORKDIR \
#          [--config.key=value ...]
#   NAME          of the workload: a-z, 0-9 and -, at most 40
#   CLUSTER       of xpk; PROJECT and ZONE as gcloud has them if not given
#   TYPE          such as v5litepod-16; SLICES of them, default 1
#   IMAGE         made of launch/Dockerfile with EXTRA=tpu and RUN_AS=root, in a registry
#   MAX_RESTARTS  of all workers at once, default 10
# xpk restarts after 42 and 127 to 255, here after 1 too; 2 (bad input) fails the workload at once.
# To start one again: xpk workload delete --workload=NAME --cluster=CLUSTER, then this.
# WORKDIR must be gs://. DRY_RUN=1 prints the command. GPUs: launch/gke_jobset.sh.
set -eu
. "$(dirname "$0")/env.sh"
[ $# -ge 2 ] || refuse "usage: bash launch/xpk.sh CONFIG WORKDIR [--config.key=value ...]"
config=$1 workdir=$2
shift 2
for name in NAME CLUSTER TYPE IMAGE; do
  [ -n "${!name:-}" ] || refuse "$name is not set; NAME CLUSTER TYPE IMAGE are needed"
done
set_bucket "$workdir"
slices=${SLICES:-1} restarts=${MAX_RESTARTS:-10}
whole SLICES "$slices"
whole MAX_RESTARTS "$restarts"

command=(xpk workload create "--workload=$NAME" "--cluster=$CLUSTER" "--tpu-type=$TYPE"
         "--num-slices=$slices" "--docker-image=$IMAGE" "--max-restarts=$restarts"
         --restart-on-exit-codes=1 --termination-grace-period-seconds=120)
[ -z "${PROJECT:-}" ] || command+=("--project=$PROJECT")
[ -z "${ZONE:-}" ] || command+=("--zone=$ZONE")
[ -z "$cache" ] || command+=("--env=JAX_COMPILATION_CACHE_DIR=$cache")
[ -z "${TFDS_DATA_DIR:-}" ] || command+=("--env=TFDS_DATA_DIR=$TFDS_DATA_DIR")
command+=("--command=$(quoted python -m jax_cl_bd "--config=$config" "--workdir=$workdir" "$@")")
run "${command[@]}"
