# shellcheck shell=bash
# Sourced by the other scripts. `setup train` (or `setup dev`) leaves a Python with hdet[train] (hdet[dev]) on PATH: the
# active virtual environment or conda environment, else .venv in the repository, made on first use.
#
#   HDET_PYTHON  the Python to make .venv with (python3)
#   HDET_TORCH   what to install where there is no torch ("torch==2.13.0"). On Linux that is the CUDA build; the CPU build
#                is smaller: HDET_TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   HDET_SETUP   0: nothing is made or installed, and `python` is the one on PATH. For machines without a network
#
# A torch that is there already is never replaced.

HDET_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

setup() {
    local extra="$1" stamp
    if [[ "${HDET_SETUP:-1}" == 0 ]]; then
        return
    fi
    if [[ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
        if [[ ! -e "$HDET_ROOT/.venv/bin/activate" ]]; then
            say "making .venv"
            # A torch that this Python already has, such as a container's CUDA build, is used and not installed again.
            "${HDET_PYTHON:-python3}" -m venv $("${HDET_PYTHON:-python3}" -c 'import torch' 2>/dev/null &&
                echo --system-site-packages) "$HDET_ROOT/.venv"
        fi
        # shellcheck disable=SC1091
        source "$HDET_ROOT/.venv/bin/activate"
    fi
    # Nothing to do if this checkout was installed with this extra, and since then neither pyproject.toml nor torch nor the
    # sources of the native ops changed, and what was compiled from them is still there.
    stamp="$(python -c 'import sys; print(sys.prefix)')/.hdet-$extra"
    if [[ "$(cat "$stamp" 2>/dev/null)" != "$(state)" ]]; then
        install_hdet "$extra"
        state >"$stamp"
    fi
}

install_hdet() {
    local extra="$1" before after constraint
    if [[ -z "$(torch_version)" ]]; then
        say "installing ${HDET_TORCH:-torch==2.13.0}"
        # shellcheck disable=SC2086
        pip_install ${HDET_TORCH:-torch==2.13.0}
    fi
    python -W ignore -c 'import torch' # one that is broken is for its owner to mend
    before="$(torch_version)"
    say "installing hdet[$extra] beside torch $before"
    constraint="$(mktemp)"
    echo "torch==$before" >"$constraint"
    # Without build isolation, so that extensions are built against the torch that will load them.
    pip_install -c "$constraint" 'setuptools>=77'
    # DeepSpeed (in the extras deepspeed and dev) compiles nothing now, and on a machine without a GPU looks for none.
    export DS_BUILD_OPS="${DS_BUILD_OPS:-0}"
    if [[ -z "${DS_ACCELERATOR:-}" && "$(python -W ignore -c 'import torch; print(torch.cuda.is_available())')" == False ]]; then
        export DS_ACCELERATOR=cpu
    fi
    pip_install -c "$constraint" --no-build-isolation -e "$HDET_ROOT[$extra]"
    rm -f "$constraint"
    after="$(torch_version)"
    if [[ "$after" != "$before" ]]; then
        echo "hdet: the installation changed torch from $before to ${after:-none}. Please report this." >&2
        exit 1
    fi
}

torch_version() {
    python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true
}

state() {
    echo "$HDET_ROOT torch $(torch_version) $(cat "$HDET_ROOT"/{pyproject.toml,csrc/*.*,csrc/cuda/*.*} | cksum)" \
        "$(cd "$HDET_ROOT/hdet/ops" && echo *.so)"
}

# For the tests of the HTML report: a Chromium, where this user may install Debian's. Elsewhere these tests are skipped,
# unless HDET_BROWSER names a Chromium or Chrome.
browser() {
    local name
    for name in "${HDET_BROWSER:-}" chromium chromium-browser google-chrome google-chrome-stable; do
        if [[ -n "$name" ]] && command -v "$name" >/dev/null; then
            return
        fi
    done
    if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
        say "installing chromium"
        (apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
            chromium fonts-dejavu-core) >/dev/null 2>&1 || say "chromium could not be installed"
    fi
}

# Processes on this machine: NPROC, else one per GPU, else $1.
processes() {
    local gpus
    if [[ -n "${NPROC:-}" ]]; then
        echo "$NPROC"
        return
    fi
    gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
    echo "$((gpus > 0 ? gpus : $1))"
}

say() {
    echo "hdet: $*" >&2
}

pip_install() {
    python -m pip install -qq --disable-pip-version-check "$@"
}
