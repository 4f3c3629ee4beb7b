# Sourced by the scripts of this folder: the environment that they share, and how they speak.
# What is already set in the caller's environment stays as it is.

: "${PYTHON:=python}"

quoted() {  # quoted WORD...: one line that a shell reads back as these words
  local word line="" quote="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      ""|*[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$quote/$escaped}'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}
refuse() {  # refuse WORD...: one line and status 2
  printf 'error: %s\n' "$*" >&2
  exit 2
}
run() {  # run WORD...: prints the command and, unless DRY_RUN is set, runs it
  quoted "$@"
  [ -n "${DRY_RUN:-}" ] || "$@"
}
program() {  # program CONFIG WORKDIR [FLAG...]: one run of jax_cl_bd
  run "$PYTHON" -m jax_cl_bd "--config=$1" "--workdir=$2" "${@:3}"
}
failed=()  # folders of the runs that `attempt` saw fail
attempt() {  # attempt CONFIG WORKDIR [FLAG...]: goes on after a run that fails; bad input ends all
  local status=0
  program "$@" || status=$?
  case $status in 0) ;; 2|130|143) exit "$status" ;; *) failed+=("$2") ;; esac
}
name_failed() {  # the last line of a script that attempts runs
  [ "${#failed[@]}" -eq 0 ] || {
    echo "error: ${#failed[@]} runs failed: $(quoted "${failed[@]}")" >&2
    exit 1
  }
}
control_of() {  # control_of FOLDER VICTIM: sets `control`, the flag that names its clean twin
  control=()
  case $2 in
    badnets_4_*|badnets_low_*|none_*|cifar10_*|in_modality_*) ;;  # their own, or none
    *_low_*) control=("--config.control_from=$1/badnets_low_${2##*_}") ;;
    *) control=("--config.control_from=$1/badnets_4_${2##*_}") ;;
  esac
}
whole() {  # whole NAME VALUE: refuses what is not a whole number from 0
  case $2 in ""|*[!0-9]*) refuse "$1=$2 must be a whole number" ;; esac
}
gpus() {  # the GPUs that JAX may use, one a line; none where nvidia-smi lists none
  local listed
  case ${JAX_PLATFORMS:-} in cpu*|tpu*) return 0 ;; esac
  listed=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -E '^[0-9]+$') ||
    return 0
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n'
  else
    printf '%s\n' "$listed"
  fi
}

# Compiled programs are kept, so that a restart does not compile anew. Of several processes only
# the first writes, and all read: the folder must be shared, as home folders mostly are, or gs://.
# Whoever can write to it can run code here. JAX_COMPILATION_CACHE_DIR= (empty) keeps none.
# https://docs.jax.dev/en/latest/persistent_compilation_cache.html
# GPU: collectives are moved so that they overlap with computation; off by default in XLA.
# https://docs.jax.dev/en/latest/gpu_performance_tips.html
GPU_XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true
# TPU: none. JAX lists flags that overlap collectives there too, but recommends none for all
# models; they go into LIBTPU_INIT_ARGS. https://docs.jax.dev/en/latest/xla_flags.html

set_environment() {  # for what is run on this machine, or inherits its environment
  : "${JAX_COMPILATION_CACHE_DIR=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/jax_cl_bd}"
  export JAX_COMPILATION_CACHE_DIR
  [ -n "$JAX_COMPILATION_CACHE_DIR" ] || unset JAX_COMPILATION_CACHE_DIR
  case " ${XLA_FLAGS:-} " in *xla_gpu_enable_latency_hiding_scheduler*) return 0 ;; esac
  [ -z "$(gpus)" ] || export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$GPU_XLA_FLAGS"
}
set_bucket() {  # set_bucket WORKDIR: for what is run in Google's cloud; sets `bucket` and `cache`
  case $1 in
    gs://?*) ;;
    *) refuse "WORKDIR=$1 must be a gs:// address: the hosts share nothing else" ;;
  esac
  bucket=${1#gs://}
  bucket=gs://${bucket%%/*}
  cache=${JAX_COMPILATION_CACHE_DIR-$bucket/jax_cl_bd_cache}
}
