#!/usr/bin/env bash
# Tries hdet with the oldest and the newest Python and torch that pyproject.toml names ([tool.hdet.environments]): makes an
# environment for each, installs hdet as a user would, runs an example on two processes and the tests that need no extra.
#   launch/environments.sh [oldest] [newest]      both, if none is named
#
#   HDET_ENVIRONMENTS  the folder to make them in; one that is there is made anew (a temporary folder)
#   HDET_PYTHONS       folders to look for Pythons in, besides PATH (~/.pyenv/versions/*/bin)
#
# From PyPI, torch on Linux is the CUDA build, some 3 GB for each environment. With the CPU build:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu launch/environments.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${HDET_ENVIRONMENTS:-$(mktemp -d)}"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH

tests=(tests/unit/test_{auto_lr,ensemble,files,layers,optimizer_settings,ops,posterior,probe,schedules,settings,tables}.py
    tests/property/test_{one_cycle,spread}.py)

# What pyproject.toml says of an environment: named oldest python
named() {
    local found
    found="$(sed -n "/^\[tool.hdet.environments\]/,/^\[/s/^$1 = .*\b$2 = \"\([^\"]*\)\".*/\1/p" pyproject.toml)"
    [[ -n "$found" ]] || { echo "environments.sh: pyproject.toml names no $2 for $1 in [tool.hdet.environments]." >&2 && return 1; }
    echo "$found"
}

# The path of a Python of this version that starts.
python_of() {
    local candidate
    # shellcheck disable=SC2086
    for candidate in $(type -ap "python$1") $(ls -d ${HDET_PYTHONS:-$HOME/.pyenv/versions/*/bin} 2>/dev/null | sed "s#\$#/python$1#"); do
        if [[ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" == "$1" ]]; then
            echo "$candidate"
            return
        fi
    done
    echo "environments.sh: no python$1 in PATH or in ${HDET_PYTHONS:-~/.pyenv/versions/*/bin}. Install it, or set HDET_PYTHONS." >&2
    return 1
}

try() {
    local name="$1" version torch python packages
    version="$(named "$name" python)"
    torch="$(named "$name" torch)"
    packages="$(named "$name" packages)"
    python="$(python_of "$version")"
    echo "== $name: Python $version, torch $torch"
    "$python" -m venv --clear "$folder/$name"
    python="$folder/$name/bin/python"
    # shellcheck disable=SC2086
    "$python" -m pip install -q --upgrade pip
    # shellcheck disable=SC2086
    "$python" -m pip install -q "torch==$torch" $packages 'setuptools>=77' pytest pytest-timeout hypothesis
    # From a copy: a build in the checkout would leave its libraries there.
    rm -rf "$folder/sources"
    mkdir "$folder/sources"
    tar -c --exclude='*.so' --exclude=__pycache__ pyproject.toml setup.cfg MANIFEST.in README.md LICENSE hdet csrc |
        tar -x -C "$folder/sources"
    # shellcheck disable=SC2086
    "$python" -m pip install -q --no-build-isolation "$folder/sources" "torch==$torch" $packages
    rm -rf "$folder/tried"
    mkdir "$folder/tried" # without hdet/, so that the tests import what was installed
    cp -r tests examples setup.cfg pyproject.toml docs csrc README.md "$folder/tried"
    (
        cd "$folder/tried"
        "$python" -m pip list --format freeze | grep -iE '^(torch|numpy|pyyaml|hdet)=='
        "$python" -c 'import hdet; print(hdet.__file__, hdet.ops.backend(), sep="\n")'
        "$python" -m torch.distributed.run --standalone --nproc-per-node=2 examples/ddp.py
        "$python" -m pytest -p no:cacheprovider "${tests[@]}"
    )
}

(($#)) || set -- oldest newest
failed=()
for name in "$@"; do
    (set -e; try "$name") & # not in a condition, where bash would go on after an error
    wait "$!" || failed+=("$name")
done
if ((${#failed[@]})); then
    echo "environments.sh: failed: ${failed[*]}; they lie in $folder" >&2
    exit 1
fi
echo "environments.sh: passed: $*"
