#!/usr/bin/env bash
# A run on GPU nodes under SLURM, one process a GPU:
#
#   sbatch --nodes=2 launch/slurm.sh --config=configs/pretrain_base.py --workdir=/scratch/runs/base
#
# The same command, submitted again, continues the run; --requeue does so by itself.
#SBATCH --job-name=mplug
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
# Ten minutes before the end, or when the job is preempted, each task gets SIGTERM: the run saves
# the step it is at and ends with 143.
#SBATCH --signal=TERM@600
#SBATCH --open-mode=append
set -euo pipefail

# SLURM itself says how many tasks there are and which one each is; JAX reads that.
export JAX_PLATFORMS=cuda
# Leaves room for NCCL's buffers beside XLA's pool.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
# Overlaps the collectives of sharded parameters with what is computed meanwhile, and lets XLA
# join small ones up to the size at which NCCL reaches the network's bandwidth.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true \
--xla_gpu_all_gather_combine_threshold_bytes=134217728 \
--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728 \
--xla_gpu_all_reduce_combine_threshold_bytes=134217728"
# Every process compiles the same program: the first one's result serves all, and every restart.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/mplug_jax}

# The signal ends `srun` only after its tasks have ended.
exec srun --kill-on-bad-exit=1 --export=ALL python -m mplug_jax.train "$@"
