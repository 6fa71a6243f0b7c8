#!/usr/bin/env bash
# Sets up, then runs every check: lint, format, types, CUDA sources, tests. Arguments go to pytest: launch/test.sh -k spread
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
setup dev
browser
cd "$HDET_ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m ruff check .
python -m ruff format --check .
if (($#)); then
    exec python -m pytest "$@"
fi
# What starts processes, and beside it all the rest: together they keep two cores busy.
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
{
    python -m mypy --config-file setup.cfg
    bash launch/compile_cuda.sh
    python -m pytest --ignore=tests/distributed
} >"$log" 2>&1 &
others=$!
status=0
python -m pytest tests/distributed || status=$?
wait "$others" || status=$?
cat "$log"
exit "$status"
