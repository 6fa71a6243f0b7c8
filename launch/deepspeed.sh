#!/usr/bin/env bash
# Trains under DeepSpeed on this machine, 2 replicas of half the processes each: one process per GPU, or 4 on the CPU; NPROC
# overrides. Arguments go to the program, and override these defaults:
#   launch/deepspeed.sh --config configs/gpt2_124m.yaml --train.deepspeed_config configs/deepspeed_zero3.json
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
setup train,deepspeed
cd "$HDET_ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --standalone --nproc-per-node="$(processes 4)" -m hdet.train --train.strategy deepspeed --train.replicas 2 \
    --hdet.gradients local --train.deepspeed_config configs/deepspeed_zero1.json "$@"
