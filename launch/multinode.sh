#!/usr/bin/env bash
# Trains on several machines. Run on each of them, at about the same time, with the same arguments:
#   NNODES=2 HEAD_ADDR=10.0.0.1 launch/multinode.sh --config configs/gpt2_124m.yaml --task.path /data/train.bin
#
#   NNODES     number of machines; 2:4 for at least two and at most four
#   HEAD_ADDR  address of one of them, which the others can reach
#   PORT       a free port there (29500)
#   JOB_ID     tells apart runs that use the same port (hdet)
#   NPROC      processes per machine: one per GPU, or 4 on the CPU
#   RESTARTS   how often the run goes on by itself after a process, or a machine other than HEAD_ADDR, has died (0); pass
#              --resume and --train.save_every. A machine that was lost joins again by the same command
#
# train.log_dir must be on a file system that all machines share, or --resume finds the checkpoint on one only. More:
# docs/guides/several_nodes.md
set -euo pipefail
: "${NNODES:?set NNODES to the number of machines}" "${HEAD_ADDR:?set HEAD_ADDR to the address of one of the machines}"
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
setup train
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A store for each attempt: torchrun tells a machine that joins later nothing of one that the others have kept.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes="$NNODES" --nproc-per-node="$(processes 4)" --max-restarts="${RESTARTS:-0}" --rdzv-backend=c10d \
    --rdzv-endpoint="$HEAD_ADDR:${PORT:-29500}" --rdzv-id="${JOB_ID:-hdet}" -m hdet.train "$@"
