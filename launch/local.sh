#!/usr/bin/env bash
# N processes of one run on this machine: launch/local.sh N [train|evaluate|...] --config=... ...
#
#   launch/local.sh 2 train --config=configs/quickstart.py --workdir=runs/two
#
# Only the environment is set here: who coordinates, how many there are, which one each is.
# DEVICES=4   fake CPU devices of each process (default: 1), for trials without accelerators
# RESTARTS=3  start all of them again after a failure, up to so many times (default: 0)
# PORT=12345  of the coordinator (default: a free one)
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "usage: launch/local.sh N train|evaluate --config=... --workdir=..." >&2
  exit 2
fi
processes=$1 module=mplug_jax.$2
shift 2

free_port='import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'
export JAX_NUM_PROCESSES=$processes
if [[ -n ${DEVICES:-} ]]; then
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$DEVICES
fi

pids=()
# A signal that ends a training run goes to every process: they save together.
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM
trap 'kill -INT "${pids[@]}" 2>/dev/null || true' INT

run_once() {
  export JAX_COORDINATOR_ADDRESS=localhost:${PORT:-$(python3 -c "$free_port")}
  pids=()
  for ((i = 0; i < processes; i++)); do
    JAX_PROCESS_ID=$i "${PYTHON:-python3}" -m "$module" "$@" &
    pids+=($!)
  done
  local status=0 code ended left=$processes
  while ((left > 0)); do
    code=0 ended=
    wait -n -p ended "${pids[@]}" || code=$?
    # A trapped signal interrupts the wait, and no process has ended.
    if [[ -z $ended ]]; then continue; fi
    ((left -= 1)) || true
    for i in "${!pids[@]}"; do
      if [[ ${pids[i]} == "$ended" ]]; then
        unset "pids[i]"
        if ((code != 0)); then
          echo "launch/local.sh: process $i ended with status $code" >&2
        fi
      fi
    done
    # The first failure is told; a run that was asked to stop must not look like a failed one.
    if ((code != 0 && (status == 0 || code == 143 || code == 130))); then status=$code; fi
  done
  return "$status"
}

for ((attempt = 0; ; attempt++)); do
  status=0
  run_once "$@" || status=$?
  if ((status == 0 || status == 2 || status == 130 || status == 143)); then exit "$status"; fi
  if ((attempt >= ${RESTARTS:-0})); then exit "$status"; fi
  echo "launch/local.sh: exit status $status, restart $((attempt + 1)) of ${RESTARTS}" >&2
done
