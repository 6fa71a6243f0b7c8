#!/usr/bin/env bash
# Builds the native ops and checks, on this machine's GPU, all that only a GPU can show. Under ten minutes, no network:
#   launch/gpu_check.sh prepare     on a machine with a network: fetch what the machine with the GPU may lack
#   launch/gpu_check.sh             there: run everything that has not passed yet; a table in runs/gpu_check
#   launch/gpu_check.sh --again     run everything anew; --help has all options
#
# The checkout travels from one to the other with build/gpu_check, which git ignores. The text that the GPT learns is the
# source of the Python standard library, which every Python has. Without a GPU all runs on the CPU, in small sizes.
#
#   HDET_PYTHON   the Python that has torch (python3)
#   HDET_TARGET   what prepare fetches for: the version of that machine's Python (3.12), on x86-64 Linux
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${HDET_PYTHON:-python3}"
prepared=build/gpu_check
needed=(numpy pyyaml 'setuptools>=77' pytest pytest-timeout hypothesis)

if [[ "${1:-}" == prepare ]]; then
    rm -rf "$prepared/wheels"
    platforms=()
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${tag}_x86_64")
    done
    "$python" -m pip download -q --disable-pip-version-check --only-binary=:all: --implementation cp \
        --python-version "${HDET_TARGET:-3.12}" "${platforms[@]}" -d "$prepared/wheels" "${needed[@]}"
    echo "gpu_check.sh: prepared $(ls "$prepared/wheels" | wc -l) wheels, $(du -sh "$prepared/wheels" | cut -f1), in $prepared/wheels"
    exit
fi

if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    echo "gpu_check.sh: $python has no torch. Set HDET_PYTHON to the Python that has one." >&2
    exit 2
fi
# What is missing there, into a folder of its own: nothing that is installed changes.
mapfile -t missing < <("$python" - "${needed[@]}" <<'PYTHON'
import re, sys
from importlib.metadata import PackageNotFoundError, version

for wanted in sys.argv[1:]:
    name, _, least = wanted.partition(">=")
    try:
        found = [int(part) for part in re.findall(r"\d+", version(name))[:1]]
    except PackageNotFoundError:
        found = []
    if not found or (least and found < [int(least)]):
        print(wanted)
PYTHON
)
export PYTHONPATH="$PWD/$prepared/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
if ((${#missing[@]})) && [[ -n "${missing[0]}" ]]; then
    echo "gpu_check.sh: installing ${missing[*]} into $prepared/site" >&2
    offline=()
    [[ -d "$prepared/wheels" ]] && offline=(--no-index --find-links "$prepared/wheels")
    "$python" -m pip install -q --disable-pip-version-check --target "$prepared/site" "${offline[@]}" "${missing[@]}"
fi
exec "$python" -m hdet.bench.gpu_check "$@"
