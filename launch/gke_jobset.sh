#!/usr/bin/env bash
# A JobSet on Kubernetes (GKE) for TPU slices, GPU nodes or CPU nodes, one process on each node.
# Usage: NAME=... IMAGE=... NODES=... bash launch/gke_jobset.sh CONFIG WORKDIR \
#          [--config.key=value ...]
#   NAME           of the JobSet: a-z, 0-9 and -, at most 40
#   IMAGE          made of launch/Dockerfile, in a registry
#   NODES          nodes (of one TPU slice)
#   TPU, TOPOLOGY  such as tpu-v5-lite-podslice and 4x4; CHIPS a node (4), SLICES (1)
#   GPU            such as nvidia-h100-80gb; GPUS a node (8). With neither TPU nor GPU: CPUs
#   MAX_RESTARTS   of all nodes at once, default 10
#   NAMESPACE, SERVICE_ACCOUNT, QUEUE   of the cluster and of Kueue, if it needs them
# One worker alone is never retried: a pod that fails fails its job, and the JobSet starts all of
# them anew once all old ones are gone (JobSet 0.7 or newer), but fails at once after status 2.
# WORKDIR must be gs://. DRY_RUN=1 prints the manifest that is otherwise given to kubectl, which
# puts it in the place of a JobSet of that name, running or not.
# Fields: jobset.sigs.k8s.io/docs/tasks/failure_policy and
# kubernetes.io/docs/tasks/job/pod-failure-policy.
set -eu
. "$(dirname "$0")/env.sh"
[ $# -ge 2 ] || refuse "usage: bash launch/gke_jobset.sh CONFIG WORKDIR [--config.key=value ...]"
config=$1 workdir=$2
shift 2
for name in NAME IMAGE NODES; do
  [ -n "${!name:-}" ] || refuse "$name is not set; NAME IMAGE NODES are needed"
done
case $NAME in
  [!a-z]*|*[!a-z0-9-]*|*-) refuse "NAME=$NAME must be a-z, 0-9 and -, and begin with a letter" ;;
esac
[ "${#NAME}" -le 40 ] || refuse "NAME=$NAME has ${#NAME} characters; 40 are allowed"
set_bucket "$workdir"
chips=${CHIPS:-4} slices=${SLICES:-1} each=${GPUS:-8} restarts=${MAX_RESTARTS:-10}
whole NODES "$NODES"
whole CHIPS "$chips"
whole SLICES "$slices"
whole GPUS "$each"
whole MAX_RESTARTS "$restarts"
[ -z "${TPU:-}" ] || [ -z "${GPU:-}" ] || refuse "TPU=$TPU and GPU=$GPU: only one of them"
[ -z "${TPU:-}" ] || [ -n "${TOPOLOGY:-}" ] || refuse "TOPOLOGY is not set; TPU=$TPU needs it"
[ -n "${TPU:-}" ] || [ "$slices" -eq 1 ] || refuse "SLICES=$slices are of TPUs; set NODES"

text() {  # text WORD: a YAML string; Kubernetes would replace $(NAME) in a command
  local word=${1//\\/\\\\}
  word=${word//\"/\\\"}
  printf '"%s"' "${word//\$(/\$\$(}"
}
variable() {  # variable NAME VALUE: one entry of env, if there is a value
  [ -z "$2" ] || printf '%14s- name: %s\n%16svalue: %s\n' "" "$1" "" "$(text "$2")"
}
words=(python -m jax_cl_bd "--config=$config" "--workdir=$workdir" "$@")
case "${words[*]}$IMAGE" in *[[:cntrl:]]*) refuse "the command holds a control character" ;; esac

manifest() {
  local word
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
END
  [ -z "${NAMESPACE:-}" ] || echo "  namespace: $(text "$NAMESPACE")"
  [ -z "${QUEUE:-}" ] ||
    printf '  labels:\n    kueue.x-k8s.io/queue-name: %s\n' "$(text "$QUEUE")"
  # A job is a slice, and a slice is a node pool.
  [ -z "${TPU:-}" ] || printf '  annotations:\n    %s\n' \
    "alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
  cat <<END
spec:
  network:
    enableDNSHostnames: true
  failurePolicy:
    maxRestarts: $restarts
    restartStrategy: BlockingRecreate
    rules:
    - name: badInput
      action: FailJobSet
      onJobFailureReasons:
      - PodFailurePolicy
  replicatedJobs:
  - name: main
    replicas: $slices
    template:
      spec:
        parallelism: $NODES
        completions: $NODES
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: main
              operator: In
              values:
              - 2
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
END
  [ -z "${SERVICE_ACCOUNT:-}" ] ||
    echo "            serviceAccountName: $(text "$SERVICE_ACCOUNT")"
  if [ -n "${TPU:-}" ]; then
    cat <<END
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(text "$TPU")
              cloud.google.com/gke-tpu-topology: $(text "$TOPOLOGY")
END
  elif [ -n "${GPU:-}" ]; then
    cat <<END
            nodeSelector:
              cloud.google.com/gke-accelerator: $(text "$GPU")
END
  fi
  cat <<END
            containers:
            - name: main
              image: $(text "$IMAGE")
              command:
END
  for word in "${words[@]}"; do echo "              - $(text "$word")"; done
  # On TPUs GKE says who is who. Elsewhere JAX would have to ask Kubernetes, with a package and
  # rights of its own: the JobSet's host names say it too.
  [ -n "${TPU:-}" ] || [ "$NODES" -eq 1 ] || cat <<END
              - "--coordinator=$NAME-main-0-0.$NAME:55527"
              - "--processes=$NODES"
              - "--process_id=\$(PROCESS_ID)"
END
  cat <<END
              env:
              - name: PROCESS_ID
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
END
  if [ -n "${GPU:-}" ]; then
    # GKE lays the driver there, but does not tell the linker. Without it JAX would use the CPU.
    # cloud.google.com/kubernetes-engine/docs/how-to/gpus
    variable LD_LIBRARY_PATH /usr/local/nvidia/lib64
    variable JAX_PLATFORMS cuda
    variable XLA_FLAGS "$GPU_XLA_FLAGS"
  fi
  variable JAX_COMPILATION_CACHE_DIR "$cache"
  variable TFDS_DATA_DIR "${TFDS_DATA_DIR:-}"
  if [ -n "${TPU:-}" ]; then
    cat <<END
              securityContext:
                privileged: true
                runAsUser: 0
              resources:
                limits:
                  google.com/tpu: $chips
END
  elif [ -n "${GPU:-}" ]; then
    cat <<END
              resources:
                limits:
                  nvidia.com/gpu: $each
END
  fi
}
found=$(manifest)
printf '%s\n' "$found"
[ -z "${DRY_RUN:-}" ] || exit 0
# Not apply, which would leave a JobSet that has ended as it is.
echo "# kubectl replace --force -f -" >&2
printf '%s\n' "$found" | kubectl replace --force -f -
