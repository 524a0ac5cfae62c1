#!/usr/bin/env bash
# Trains on a Cloud TPU slice through gcloud, the same command on all of its hosts.
#
#   export TPU_NAME=my-slice ZONE=us-central2-b
#   launch/tpu/pod.sh setup                    copies this repository to all hosts and installs it
#   launch/tpu/pod.sh train --config=configs/lit_cwcl.py:paper --workdir=/mnt/runs/paper
#   launch/tpu/pod.sh stop                     SIGTERM: all hosts save the same step and stop
#   launch/tpu/pod.sh run COMMAND ARGUMENT...  anything else, on all hosts
#
# The workdir is a path that all hosts see: a bucket mounted by gcsfuse, Filestore, NFS.
# Variables: TPU_NAME, ZONE; PROJECT (default: gcloud's), FOLDER on the hosts (default: cwcl_jax),
# RETRIES of `train` after a failure (default: 3). jax finds the hosts by itself. Never run on a TPU.
set -euo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2 && exit 2; }

: "${TPU_NAME:?set TPU_NAME to the name of the slice}" "${ZONE:?set ZONE to the zone of the slice}"
FOLDER=${FOLDER:-cwcl_jax}
where=(--zone="$ZONE")
[[ -z ${PROJECT:-} ]] || where+=(--project="$PROJECT")
root=$(cd "$(dirname "$0")/../.." && pwd)

# Runs the words, each quoted for the remote shell, in FOLDER on every host.
everywhere() {
  local words
  printf -v words '%q ' "$@"
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker=all \
    --command="cd $(printf %q "$FOLDER") && $words"
}

setup() {
  local archive
  archive=$(mktemp -d)/cwcl_jax.tar.gz
  git -C "$root" archive --format=tar.gz -o "$archive" HEAD
  gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:/tmp/cwcl_jax.tar.gz" "${where[@]}" --worker=all
  gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker=all --command="$(
    printf 'mkdir -p %q && tar -xzf /tmp/cwcl_jax.tar.gz -C %q' "$FOLDER" "$FOLDER"
  )"
  everywhere python3 -m pip install --quiet --editable ".[tpu]"
}

train() {
  local attempt code
  for ((attempt = 0; attempt <= ${RETRIES:-3}; attempt++)); do
    code=0
    # shellcheck disable=SC2016  # $@ is for the remote shell
    everywhere bash -c 'set -a; . launch/env/tpu.env; set +a; exec python3 -m cwcl_jax.train "$@"' \
      train "$@" || code=$?
    case $code in
      0 | 2) return "$code" ;;
      75) echo "pod.sh: stopped and saved; the same command resumes" >&2 && return 75 ;;
    esac
    echo "pod.sh: exit code $code in attempt $((attempt + 1))" >&2
  done
  return "$code"
}

case "${1:-}" in
  setup) setup ;;
  train) shift && train "$@" ;;
  # The brackets keep pkill from matching the shell that runs it.
  stop) everywhere pkill -TERM -f "[p]ython3 -m cwcl_jax.train" ;;
  run) shift && [[ $# -gt 0 ]] && everywhere "$@" ;;
  *) usage ;;
esac
