#!/usr/bin/env bash
# UniMatch on two nodes of four GPUs under SLURM: one torchrun a node, which meet at the first node's address.
#
#   sbatch scripts/dev/slurm_example.sh --labeled-id-path … --unlabeled-id-path … --save-path runs/seco
#
# What follows the file name are train_unimatch.py's options.
#
# The global batch stays --global-batch (8: one sample a GPU). All nodes must see the repository, --root-path and --save-path
# under the same paths. A job that was stopped goes on when it is submitted again with the same options. Adapt the lines below.
#SBATCH --job-name=seco
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
PYTHON="${PYTHON:-.venv/bin/python}"   # made by scripts/lib/setup.sh

HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
exec srun --kill-on-bad-exit=1 "$PYTHON" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${GPUS_PER_NODE:-4}" \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:$((20000 + SLURM_JOB_ID % 20000))" --rdzv_id "$SLURM_JOB_ID" \
    --rdzv_conf join_timeout=120 \
    train_unimatch.py --workers 4 "$@"
