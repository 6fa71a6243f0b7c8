#!/usr/bin/env bash
# Sets up, then runs every check: lint, format, types, CUDA sources, tests. Arguments go to pytest: launch/test.sh -k spread
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
setup dev
cd "$HDET_ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m ruff check .
python -m ruff format --check .
python -m mypy --config-file setup.cfg
bash launch/compile_cuda.sh
# Tests that start processes run on one worker, all others on the other: see tests/distributed/conftest.py.
python -m pytest -n 2 --dist loadgroup "$@"
