#!/usr/bin/env bash
# Trains on this machine with FSDP2, 2 replicas of half the processes each: one process per GPU, or 4 on the CPU; NPROC
# overrides. Arguments go to the program, and override these defaults:
#   launch/fsdp.sh --config configs/gpt2_124m.yaml --train.replicas 4 --train.dtype bfloat16
set -euo pipefail
bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" --train.strategy fsdp --train.replicas 2 "$@"
