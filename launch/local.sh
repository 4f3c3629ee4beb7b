#!/usr/bin/env bash
# One machine: a CPU, one GPU, eight GPUs. Stop it and start it again at will.
# Usage: [DRY_RUN=1] [PROCESSES=1] bash launch/local.sh CONFIG WORKDIR [--config.key=value ...]
#   PROCESSES  how many processes; one drives all devices, several share the GPUs equally
#   DEVICES    simulated CPU devices of each process, with JAX_PLATFORMS=cpu
#   PORT       where the processes find one another on 127.0.0.1; a free one if not given
#   PYTHON     the Python to run, default python
#   GRACE      seconds from SIGTERM to SIGKILL for those that are left when one died, default 10
#   STOP_GRACE the same after a signal to this script, from the first end on, default 120
# With several, process 0 writes to the terminal, process I to WORKDIR/logs/process-I.log. If one
# dies, the others are ended, and what to do is said; the exit status is that of the first to die
# (128 + the signal). SIGINT, SIGTERM and SIGHUP go to all: once to save and stop, a second time to
# stop without saving, a third time as SIGKILL.
set -eu
. "$(dirname "$0")/env.sh"
[ $# -ge 2 ] || refuse "usage: bash launch/local.sh CONFIG WORKDIR [--config.key=value ...]"
given=${XLA_FLAGS:-}
set_environment
config=$1 workdir=$2
shift 2
processes=${PROCESSES:-1} grace=${GRACE:-10} stop_grace=${STOP_GRACE:-120}
whole PROCESSES "$processes"
whole GRACE "$grace"
whole STOP_GRACE "$stop_grace"
[ "$processes" -ge 1 ] || refuse "PROCESSES=$processes must be at least 1"
if [ -n "${DEVICES:-}" ]; then
  whole DEVICES "$DEVICES"
  XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
fi
command=("$PYTHON" -m jax_cl_bd "--config=$config" "--workdir=$workdir" "$@")
[ "${XLA_FLAGS:-}" = "$given" ] || command=(env "XLA_FLAGS=$XLA_FLAGS" "${command[@]}")

if [ "$processes" -eq 1 ]; then
  quoted "${command[@]}"
  [ -z "${DRY_RUN:-}" ] || exit 0
  exec "${command[@]}"
fi

free_port() {  # below the range from which systems take ports for outgoing connections
  local port tries
  for tries in 1 2 3 4 5 6 7 8 9 10; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { echo "$port"; return; }
  done
  refuse "found no free port in $tries tries; set PORT"
}
port=${PORT:-$(free_port)}
devices=()
while read -r name; do devices+=("$name"); done <<<"$(gpus)"
[ -n "${devices[0]}" ] || devices=()
[ $((${#devices[@]} % processes)) -eq 0 ] ||
  refuse "PROCESSES=$processes must divide the ${#devices[@]} GPUs of this machine"
share=$((${#devices[@]} / processes))

words_of() {  # words_of I: sets `words`, the command of process I
  words=("${command[@]}" "--coordinator=127.0.0.1:$port" "--processes=$processes"
         "--process_id=$1")
  [ "$share" -gt 0 ] || return 0
  local IFS=,
  words=(env "CUDA_VISIBLE_DEVICES=${devices[*]:$(($1 * share)):$share}" "${words[@]}")
}
for ((i = 0; i < processes; i++)); do
  words_of "$i"
  quoted "${words[@]}"
done
[ -z "${DRY_RUN:-}" ] || exit 0

case $workdir in
  *://*) logs=${TMPDIR:-/tmp}/jax_cl_bd-logs-$$ ;;
  *) logs=$workdir/logs ;;
esac
mkdir -p "$logs" 2>/dev/null || refuse "cannot write to $logs"
say() { printf 'launch/local.sh: %s\n' "$1" >&3; }
exec 3>&2

pids=() ended=()  # of each process; its exit status, "" while it runs
send() {  # send SIGNAL: to all that run; SIGKILL to their worker processes too
  local j
  for ((j = 0; j < ${#pids[@]}; j++)); do
    [ -z "${ended[j]}" ] || continue
    if [ "$1" = KILL ]; then kill -KILL -- "-${pids[j]}" 2>/dev/null || :
    else kill "-$1" "${pids[j]}" 2>/dev/null || :
    fi
  done
}
signals=0
pass_on() {
  signals=$((signals + 1))
  if [ "$signals" -ge 3 ]; then send KILL; else send "$1"; fi
}
trap 'pass_on INT' INT
trap 'pass_on TERM' TERM HUP

# In process groups of their own (set -m), so that Ctrl-C reaches them by this script alone, and
# so that SIGKILL takes their worker processes along.
set -m
for ((i = 0; i < processes; i++)); do
  words_of "$i"
  if [ "$i" -eq 0 ]; then
    "${words[@]}" </dev/null &
  else
    quoted "${words[@]}" >>"$logs/process-$i.log"
    "${words[@]}" </dev/null >>"$logs/process-$i.log" 2>&1 &
  fi
  pids[i]=$! ended[i]=""
done
set +m
[ "$signals" -eq 0 ] || send TERM  # one that came while they were started
say "$processes processes; the output of those after process 0 is in $logs"

rank() {  # of several ends at one look: what is a mere reaction to another's death comes last
  case $1 in 0) echo 0 ;; 1) echo 1 ;; 134) echo 2 ;; *) echo 3 ;; esac
}
first="" status=0 deadline=""
exec 2>/dev/null  # bash names killed jobs by the lines of this script
while :; do
  running=0 best=0
  for ((i = 0; i < processes; i++)); do
    [ -z "${ended[i]}" ] || continue
    if kill -0 "${pids[i]}" 2>/dev/null; then
      running=$((running + 1))
      continue
    fi
    code=0
    wait "${pids[i]}" 2>/dev/null || code=$?
    ended[i]=$code
    [ "$code" -eq 0 ] || kill -KILL -- "-${pids[i]}" 2>/dev/null || :  # its worker processes
    if [ -z "$deadline" ] && [ "$(rank "$code")" -gt "$best" ]; then
      best=$(rank "$code") first=$i status=$code
    fi
  done
  [ "$running" -gt 0 ] || break
  if [ -z "$deadline" ] && [ "$status" -ne 0 ]; then
    if [ "$signals" -gt 0 ]; then
      deadline=$((SECONDS + stop_grace))
    else
      deadline=$((SECONDS + grace))
      say "process $first ended with status $status; ending the others"
      send TERM
    fi
  fi
  [ -z "$deadline" ] || [ "$SECONDS" -lt "$deadline" ] || send KILL
  sleep 0.2 || :  # which Ctrl-C ends
done
exec 2>&3
[ "$status" -ne 0 ] || exit 0

restart() {  # the command that was given, with the environment that makes it the same
  local name words=(env "PROCESSES=$processes")
  for name in DEVICES PORT JAX_PLATFORMS CUDA_VISIBLE_DEVICES; do
    [ -z "${!name:-}" ] || words+=("$name=${!name}")
  done
  [ "$PYTHON" = python ] || words+=("PYTHON=$PYTHON")
  quoted "${words[@]}" bash "$0" "$config" "$workdir" "$@"
}
last_good() {  # the newest step with digests of what is, or was last, trained; where it lies
  local place=$workdir folder step newest=""
  [ ! -e "$workdir/control/pretrain/settings.json" ] || place=$workdir/control
  for folder in "$place"/checkpoints/*/; do
    step=$(basename "$folder")
    case $step in *[!0-9]*) continue ;; esac
    [ -e "$folder/digests.json" ] || continue
    [ -n "$newest" ] && [ "$step" -le "$newest" ] || newest=$step
  done
  echo "${newest:-none} (in $place/checkpoints)"
}
if [ "$first" -gt 0 ] && [ "$status" -ne 143 ] && [ "$status" -ne 130 ]; then
  tail -n 1 "$logs/process-$first.log" >&2  # its last words; those of process 0 were shown
fi
[ "$status" -ne 2 ] || exit 2
if [ "$signals" -gt 0 ]; then
  say "stopped; to go on: $(restart "$@")"
  exit "$status"
fi
how="ended with status $status"
[ "$status" -le 128 ] || ! name=$(kill -l $((status - 128)) 2>/dev/null) ||
  how="was ended by SIG$name"
say "process $first of $processes $how; the others were ended"
case $workdir in
  *://*) say "last good step: the newest under $workdir/checkpoints with a digests.json" ;;
  *) say "last good step: $(last_good)" ;;
esac
say "to go on from there: $(restart "$@")"
exit "$status"
