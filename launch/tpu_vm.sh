#!/usr/bin/env bash
# A Cloud TPU slice, as a queued resource that holds one node of the same name.
# Usage, with NAME and ZONE set (create and run: TYPE and VERSION too):
#   bash launch/tpu_vm.sh create                                        make it, wait, install
#   bash launch/tpu_vm.sh run CONFIG WORKDIR [--config.key=value ...]   on all workers
#   bash launch/tpu_vm.sh restart CONFIG WORKDIR [...]   end what still runs there, then run
#   bash launch/tpu_vm.sh delete                         gcloud asks before it deletes
#   NAME, ZONE, PROJECT  of the slice; PROJECT as gcloud has it if not given
#   TYPE, VERSION        such as v5litepod-16 and v2-alpha-tpuv5-lite
#   SPOT=1               pre-emptible: cheaper, and taken away at any time
#   RECREATIONS, RETRIES how often `run` makes a slice anew that was taken away (20), and starts
#                        again on a slice that is there (3); never after status 2 (bad input)
#   WAIT_MINUTES         how long a queued slice is waited for, 1440 if not given
# WORKDIR must be gs://, since the workers share nothing else. `run` needs this terminal (tmux):
# closed, nothing restarts. Ctrl-C stops the workers, which save. A slice is deleted only if gcloud
# says that it was taken away, never because gcloud fails. DRY_RUN=1 prints the commands.
set -eu
. "$(dirname "$0")/env.sh"
usage="usage: bash launch/tpu_vm.sh create|run|restart|delete [CONFIG WORKDIR ...]"
[ $# -ge 1 ] || refuse "$usage"
action=$1
shift
case $action in create|run|restart|delete) ;; *) refuse "$usage" ;; esac
needed="NAME ZONE"
[ "$action" = delete ] || needed="NAME ZONE TYPE VERSION"
for name in $needed; do
  [ -n "${!name:-}" ] || refuse "$name is not set; $action needs $needed in the environment"
done
place=("--zone=$ZONE")
[ -z "${PROJECT:-}" ] || place+=("--project=$PROJECT")
recreations=${RECREATIONS:-20} retries=${RETRIES:-3} minutes=${WAIT_MINUTES:-1440}
whole RECREATIONS "$recreations"
whole RETRIES "$retries"
whole WAIT_MINUTES "$minutes"
queued=(gcloud compute tpus queued-resources) node=(gcloud compute tpus tpu-vm)
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
say() { printf 'launch/tpu_vm.sh: %s\n' "$1" >&2; }

on_workers() {  # on_workers COMMAND: gcloud's status is that of the first worker that failed
  run "${node[@]}" ssh "$NAME" "${place[@]}" --worker=all "--command=$1"
}
interrupted=""  # 1 once Ctrl-C was pressed
clear=""        # 1 once the workers may run something that must end before it is started again
now=""          # what was last said of the slice
ended() {  # after Ctrl-C
  [ -z "$clear" ] || stop || :
  say "stopped; the same command goes on from the last checkpoint"
  exit 130
}
pause() { sleep 30 || :; [ -z "$interrupted" ] || ended; }
describe() {  # describe FIELD WORD...: sets `now` to that; NONE: there is no such thing; ASK: again
  if now=$("${@:2}" describe "$NAME" "${place[@]}" "--format=value($1)" 2>"$errors"); then
    now=${now:-UNKNOWN}
  elif grep -q NOT_FOUND "$errors"; then
    now=NONE
  else
    now=ASK
  fi
}
state() {  # sets `now`: READY if it can be used, NONE if there is no slice, or what gcloud says
  local began=$SECONDS
  while :; do
    describe state.state "${queued[@]}"
    if [ "$now" = ACTIVE ]; then  # a pre-empted node may still lie in such a request, or be gone
      describe state "${node[@]}"
      [ "$now" != NONE ] || now=GONE
    fi
    [ -z "$interrupted" ] || ended
    [ "$now" = ASK ] || return 0
    [ $((SECONDS - began)) -lt $((minutes * 60)) ] ||
      { say "gcloud did not say how $NAME is in $minutes minutes"; exit 1; }
    say "gcloud does not say how $NAME is, and is asked again: $(
      grep -m 1 ERROR "$errors" || tail -n 1 "$errors")"
    pause
  done
}
create() {
  run "${queued[@]}" create "$NAME" "--node-id=$NAME" "${place[@]}" \
    "--accelerator-type=$TYPE" "--runtime-version=$VERSION" ${SPOT:+--spot} || exit 1
}
remove() {
  run "${queued[@]}" delete "$NAME" "${place[@]}" --force "$@" || exit 1
}
wait_until_ready() {  # fails if there is no slice (NONE), or it was taken away (another state)
  local began=$SECONDS
  if [ -n "${DRY_RUN:-}" ]; then
    echo "# every 30 s until it is ACTIVE:"
    quoted "${queued[@]}" describe "$NAME" "${place[@]}" "--format=value(state.state)"
    return
  fi
  while :; do
    state
    case $now in
      READY) return ;;
      NONE|GONE|FAILED|SUSPENDING|SUSPENDED|PREEMPTED|TERMINATED|STOPPED|DELETING) return 1 ;;
    esac
    [ $((SECONDS - began)) -lt $((minutes * 60)) ] ||
      { say "$NAME is still $now after $minutes minutes"; exit 1; }
    say "$NAME is $now"
    pause
  done
}
install() {  # the working tree as it is; uv brings a Python, since the images may have an older one
  local root archive
  root=$(cd "$(dirname "$0")/.." && pwd)
  archive=${TMPDIR:-/tmp}/$NAME.tar.gz
  run tar -czf "$archive" --exclude=__pycache__ -C "$root" pyproject.toml constraints.txt \
    README.md LICENSE jax_cl_bd configs &&
    run "${node[@]}" scp "$archive" "$NAME:jax_cl_bd.tar.gz" "${place[@]}" --worker=all &&
    on_workers "mkdir -p jax_cl_bd && cd jax_cl_bd && tar -xzf ../jax_cl_bd.tar.gz &&\
 python3 -m pip install -q --user uv &&\
 { [ -x .venv/bin/python ] || python3 -m uv venv -q --python 3.12 .venv; } &&\
 python3 -m uv pip install -q --python .venv/bin/python -c constraints.txt -e '.[tpu]' gcsfs"
}
case $action in
  create)
    create
    wait_until_ready || { say "$NAME was not made, or taken away at once"; exit 1; }
    install || exit 1
    exit 0 ;;
  delete) remove; exit 0 ;;
esac

[ $# -ge 2 ] ||
  refuse "usage: bash launch/tpu_vm.sh $action CONFIG WORKDIR [--config.key=value ...]"
config=$1 workdir=$2
shift 2
set_bucket "$workdir"
quoted gcloud storage ls "$bucket"
[ -n "${DRY_RUN:-}" ] || gcloud storage ls "$bucket" >/dev/null ||
  refuse "$bucket cannot be listed"
variables=(env)
[ -z "$cache" ] || variables+=("JAX_COMPILATION_CACHE_DIR=$cache")
[ -z "${TFDS_DATA_DIR:-}" ] || variables+=("TFDS_DATA_DIR=$TFDS_DATA_DIR")
command=$(quoted "${variables[@]}" .venv/bin/python -m jax_cl_bd "--config=$config" \
          "--workdir=$workdir" "$@")

start() {  # start ATTEMPT
  # gcloud repeats a command whose connection broke, on that worker alone: there it ends at once.
  on_workers "cd jax_cl_bd && [ \"\$(cat run.attempt 2>/dev/null)\" != $1 ] &&\
 echo $1 >run.attempt && echo \$\$ >run.pid && exec $command"
}
stop() {  # ends what runs on the workers; it saves
  on_workers "cd jax_cl_bd 2>/dev/null && pid=\$(cat run.pid 2>/dev/null) || exit 0;\
 running() { grep -q jax_cl_bd /proc/\$pid/cmdline 2>/dev/null; };\
 running && kill -TERM \$pid; for i in \$(seq 120); do running || exit 0; sleep 1; done;\
 kill -KILL \$pid"
}
if [ -n "${DRY_RUN:-}" ]; then
  [ "$action" = run ] || stop
  echo "# if there is no slice $NAME; one that was taken away is deleted first:"
  create
  wait_until_ready
  install
  start 0
  exit 0
fi
trap 'interrupted=1' INT
made=0 tries=0 starts=0 installed=""
[ "$action" = run ] || clear=1
while :; do
  until wait_until_ready; do
    [ "$made" -lt "$recreations" ] || { say "$NAME was made $made times; giving up"; exit 1; }
    made=$((made + 1)) installed=""
    [ "$now" = NONE ] || remove --quiet
    create
  done
  status=0
  { [ -z "$clear" ] || stop; } && { [ -n "$installed" ] || install; } || status=1
  if [ "$status" -eq 0 ] && [ -z "$interrupted" ]; then
    installed=1 clear=1 starts=$((starts + 1))
    start "$(date +%s)-$$-$starts" || status=$?
  fi
  [ -z "$interrupted" ] || ended
  case $status in 0|2) exit "$status" ;; esac
  pause
  state
  if [ "$now" = READY ]; then
    [ "$tries" -lt "$retries" ] || { say "status $status after $tries retries"; exit "$status"; }
    tries=$((tries + 1))
    say "status $status; retry $tries of $retries"
  else
    say "status $status; $NAME was taken away and is made anew"
  fi
done
