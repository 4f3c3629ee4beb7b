#!/usr/bin/env bash
# One machine with Docker: a run in a container. Stop it and start it again at will.
# Usage: [DRY_RUN=1] [GPUS=all] bash launch/docker.sh CONFIG WORKDIR [--config.key=value ...]
#   GPUS           all, or how many (CUDA_VISIBLE_DEVICES chooses among all); without it the CPU
#   IMAGE          jax_cl_bd:cpu or jax_cl_bd:gpu if not given; made of launch/Dockerfile where it
#                  is missing. It holds the code and configs/ as they were: BUILD=1 makes it anew
#   TFDS_DATA_DIR  the data, if any, which the container can only read
#   MOUNTS         what else it can read, A:B:..., such as the run of --config.victim
#   SHM_SIZE       shared memory, in which workers of the feed hand over batches; default 8g
# The container sees no other folders, these and WORKDIR under the names given here, relative to the
# working folder or absolute. It runs as the caller, who owns what it writes. Ctrl-C, SIGTERM and
# docker stop have it save; the exit status is the program's, 125 to 127 are Docker's own.
set -eu
here=$(dirname "$0")
. "$here/env.sh"
[ $# -ge 2 ] || refuse "usage: bash launch/docker.sh CONFIG WORKDIR [--config.key=value ...]"
[ -n "${DRY_RUN:-}" ] || type docker >/dev/null 2>&1 || refuse "docker is not installed here"
set_environment
config=$1 workdir=$2
shift 2
kind=cpu
[ -z "${GPUS:-}" ] || kind=gpu
image=${IMAGE:-jax_cl_bd:$kind}
case ${GPUS:-} in
  ""|all) ;;
  *) whole GPUS "$GPUS"
     [ "$GPUS" -ge 1 ] || refuse "GPUS=$GPUS must be at least 1, or all" ;;
esac

command=(docker run --rm --init --stop-timeout=120 "--shm-size=${SHM_SIZE:-8g}"
         "--user=$(id -u):$(id -g)" --env=HOME=/tmp)
share() {  # share NAME PATH [:ro]: what lies under this path here does so in the container
  local from=$2 to=$2
  case $2 in
    ""|*://*) return 0 ;;
    /*) ;;
    *) from=$PWD/$2 to=/app/$2 ;;
  esac
  case $from in *:*) refuse "$1=$2 lies at $from, and Docker allows no colon there" ;; esac
  if [ "${3:-}" = :ro ]; then
    [ -e "$from" ] || refuse "$1=$2 does not exist"
  elif [ -z "${DRY_RUN:-}" ]; then
    mkdir -p "$from" 2>/dev/null || refuse "$1=$2 cannot be made"
  fi
  command+=("--volume=$from:$to${3:-}")
}
variable() {  # variable NAME: passed on if it is set
  [ -z "${!1:-}" ] || command+=("--env=$1=${!1}")
}
share WORKDIR "$workdir"
share JAX_COMPILATION_CACHE_DIR "${JAX_COMPILATION_CACHE_DIR:-}"
share TFDS_DATA_DIR "${TFDS_DATA_DIR:-}" :ro
variable JAX_COMPILATION_CACHE_DIR
variable TFDS_DATA_DIR
IFS=: read -r -a mounts <<<"${MOUNTS:-}"
for path in ${mounts[@]+"${mounts[@]}"}; do share MOUNTS "$path" :ro; done
if [ "$kind" = gpu ]; then  # without a driver JAX would use the CPU
  command+=("--gpus=$GPUS" --env=JAX_PLATFORMS=cuda "--env=XLA_FLAGS=$GPU_XLA_FLAGS")
  variable CUDA_VISIBLE_DEVICES
fi
command+=("$image" "--config=$config" "--workdir=$workdir" "$@")

build=(docker build -f "$here/Dockerfile" -t "$image")
[ "$kind" = cpu ] || build+=(--build-arg=EXTRA=gpu)
build+=("$here/..")
if [ -n "${DRY_RUN:-}" ]; then
  [ -n "${BUILD:-}" ] || echo "# if there is no image $image:"
  quoted "${build[@]}"
  quoted "${command[@]}"
  exit 0
fi
[ -z "${BUILD:-}" ] && docker image inspect "$image" >/dev/null 2>&1 || run "${build[@]}" || exit 1
quoted "${command[@]}"
exec "${command[@]}"
