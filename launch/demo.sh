#!/usr/bin/env bash
# Sets up, then trains a small GPT twice from a learning rate 10 times too low: as plain OneCycle with DDP, and with hdet.
# One process per GPU if there are several, else 4 on the CPU; NPROC overrides. A few minutes on 2 cores. Results in runs/demo.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
setup train
cd "$HDET_ROOT"
rm -rf runs/demo

count="$(processes 4)" device=auto
if ((count < 2)); then # a single GPU: one replica has nobody to differ from
    count=4 device=cpu
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
train() {
    torchrun --standalone --nproc-per-node="$count" -m hdet.train --config configs/char_lm_demo.yaml \
        --train.device "$device" "$@"
}
train --train.log_dir runs/demo/plain --hdet.spread 0
train --train.log_dir runs/demo/hdet

echo
python -m hdet.train.compare runs/demo/plain runs/demo/hdet --output runs/demo/demo.png
python -m hdet.report runs/demo/plain runs/demo/hdet --output runs/demo/report.html
echo "TensorBoard: tensorboard --logdir $HDET_ROOT/runs/demo"
