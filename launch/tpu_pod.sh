#!/usr/bin/env bash
# A run on a TPU pod of Cloud TPU VMs, one process a host:
#
#   launch/tpu_pod.sh NAME ZONE --config=configs/pretrain_base.py --workdir=gs://bucket/runs/base
#
# The hosts have the repository in ~/mplug_jax and `pip install -r requirements.txt "jax[tpu]"` done.
set -euo pipefail

if (($# < 3)); then
  echo "usage: launch/tpu_pod.sh NAME ZONE --config=... --workdir=gs://..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2

# The VMs' metadata server knows the hosts of the pod; --detect_processes asks it.
# LIBTPU_INIT_ARGS: gradients are reduced while the backward pass goes on.
printf -v command 'cd ~/mplug_jax && JAX_PLATFORMS=tpu %s %s python -m mplug_jax.train --detect_processes%s' \
  "LIBTPU_INIT_ARGS='--xla_tpu_enable_async_collective_fusion=true --xla_enable_async_all_gather=true'" \
  "JAX_COMPILATION_CACHE_DIR=\$HOME/.cache/mplug_jax" \
  "$(printf ' %q' "$@")"

exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
