"""Compiles the native ops when the package is built: the commands that pyproject.toml names.

Needs torch >= 2.10 and a C++17 compiler; the CUDA library also needs a CUDA torch and an nvcc of its major version.
The torch is that of the build environment, or, where pip isolates the build, that of the environment it installs into.
What cannot be compiled is left out with a warning that says why, and the package works without it, in plain torch;
``import hdet`` then says so. A wheel without any library is named ``py3-none-any``, one with a library for the
platform. ``HDET_BUILD_NATIVE=1`` makes a build fail that cannot compile the CPU ops. The libraries use libtorch's
stable ABI and no Python: they serve every Python, and every torch from 2.10 on.

``pip wheel .`` and ``pip install .`` find the torch of their environment. ``python -m build`` makes an environment of
its own, which has none, and so a ``py3-none-any`` wheel; ``python -m build --no-isolation`` makes one for the platform.

A build from a checkout also leaves the libraries in the checkout, since a Python that is started there imports
``hdet/`` from there, and not the installed package.

``python csrc/build_native.py check DIR`` compiles the CUDA sources into DIR for sm_80, sm_90 and sm_100 with warnings
as errors, and links them; it needs neither a GPU nor a CUDA torch. ``... emulate FILE`` compiles them for the CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).parent
ARCHITECTURES = ("80", "90", "100")
# Contraction off: arithmetic.h must give the same bits everywhere. The -fno flags change no result; they let loops
# with a select be vectorised.
CXX_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]


class BuildNative(build_ext):
    """``build_ext`` with its own compiler commands, for libraries that are not Python modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        for extension in self.extensions:  # no library of older sources may stay, whatever can be compiled now
            for directory in (self.build_lib, "."):
                Path(directory, self.get_ext_filename(extension.name)).unlink(missing_ok=True)
        super().run()
        if not self.inplace:  # else setuptools does it
            self.copy_extensions_to_source()

    def build_extensions(self) -> None:
        for extension in self.extensions:
            name = extension.name.rsplit(".", 1)[1]
            library = Path(self.get_ext_fullpath(extension.name))
            library.parent.mkdir(parents=True, exist_ok=True)
            try:
                build_cuda(library) if name.endswith("cuda") else build_cpu(library)
                print(f"hdet: compiled {library}")
            except CannotBuildError as reason:
                if name.endswith("cpu") and os.environ.get("HDET_BUILD_NATIVE", "0") != "0":
                    sys.exit(f"hdet: HDET_BUILD_NATIVE=1, and {name} cannot be compiled: {reason}")
                self.warn(f"hdet: {name} is left out, plain torch takes its place: {reason}")

    def compiled(self) -> list[Path]:
        """The libraries that there are now."""
        paths = [Path(self.build_lib, self.get_ext_filename(extension.name)) for extension in self.extensions]
        return [path for path in paths if path.exists()]


class NativeWheel(bdist_wheel):
    """``bdist_wheel`` that compiles first, and names a wheel in which nothing is compiled ``py3-none-any``."""

    def run(self) -> None:
        self.run_command("build_ext")
        if not self.get_finalized_command("build_ext").compiled():
            self.distribution.ext_modules = []
            self.root_is_pure = True
            self.warn(
                "hdet: THIS WHEEL HAS NO NATIVE OPS, the reasons stand above; it is named py3-none-any. For a wheel "
                "with them install torch, then: pip wheel --no-build-isolation --no-deps . "
                "(or python -m build --no-isolation)"
            )
        super().run()


class CannotBuildError(Exception):
    """Why a library cannot be built here."""


def build_cpu(library: Path) -> None:
    """Compile the CPU kernels into ``library``."""
    run(compiler(), *CXX_FLAGS, *torch_includes(), SOURCES / "ops.cpp", *link_flags(), "-ltorch_cpu", "-o", library)


def build_cuda(library: Path) -> None:
    """Compile the CUDA kernels into ``library``, for this machine's GPUs or ``TORCH_CUDA_ARCH_LIST``."""
    import_torch()
    import torch

    if torch.version.cuda is None:
        raise CannotBuildError(f"torch {torch.__version__} is built without CUDA")
    nvcc = find_nvcc()
    if nvcc is None:
        raise CannotBuildError("no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
    version = nvcc_version(nvcc)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        raise CannotBuildError(f"{nvcc} is of CUDA {version}, torch of CUDA {torch.version.cuda}")
    with tempfile.TemporaryDirectory() as directory:
        kernels = Path(directory, "kernels.o")
        compile_kernels(kernels, nvcc, architectures())
        link_cuda(library, kernels, nvcc)


def compile_kernels(kernels: Path, nvcc: Path, architectures: Sequence[str], *strict: str) -> None:
    """Compile the kernels for every architecture; the last one's PTX serves GPUs that are newer."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    targets.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    run(nvcc, *NVCC_FLAGS, *strict, *targets, "--threads=0", "-c", SOURCES / "cuda/kernels.cu", "-o", kernels)


def link_cuda(library: Path, kernels: Path, nvcc: Path, *strict: str, torch_cuda: Path | None = None) -> None:
    """Compile the binding and link it with ``kernels`` and with torch's own CUDA runtime, found by name at load."""
    binding = kernels.with_name("binding.o")
    source = SOURCES / "cuda/binding.cpp"
    run(compiler(), *CXX_FLAGS, *strict, "-DUSE_CUDA", *torch_includes(), "-c", source, "-o", binding)
    paths = [f"-L{torch_cuda}"] if torch_cuda else []
    libraries = [*paths, f"-L{import_torch() / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-cudart=shared"]
    run(nvcc, "-shared", "-Xlinker=-z,defs", binding, kernels, *libraries, "-o", library)


def check_cuda(directory: Path) -> None:
    """Compile and link the CUDA sources with warnings as errors. One symbol stands in for a CUDA torch."""
    nvcc = find_nvcc()
    if nvcc is None:
        print("The CUDA sources are not checked: no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
        return
    stub = directory / "torch_cuda.cpp"
    stub.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
    run(compiler(), "-shared", "-fPIC", stub, "-o", directory / "libtorch_cuda.so")
    kernels = directory / "kernels.o"
    compile_kernels(kernels, nvcc, ARCHITECTURES, "-Werror=all-warnings", "-Xcompiler=-Werror")
    link_cuda(directory / "native_cuda.so", kernels, nvcc, "-Werror", torch_cuda=directory)
    print(f"CUDA sources: compiled and linked for {', '.join(f'sm_{a}' for a in ARCHITECTURES)}")


def emulate_cuda(library: Path) -> None:
    """Compile the CUDA ops for the CPU, as ``torch.ops.hdet_emulated``: see csrc/cuda/emulation.h."""
    flags = [*CXX_FLAGS, "-O1", "-Werror", "-Wno-unknown-pragmas"]
    source = SOURCES / "cuda/emulation.cpp"
    run(compiler(), *flags, *torch_includes(), source, *link_flags(), "-ltorch_cpu", "-o", library)


def architectures() -> list[str]:
    """Compute capabilities to compile for, such as ``["80", "90"]``."""
    import torch

    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return [a.removesuffix("+PTX").replace(".", "") for a in wanted.replace(";", " ").split()]
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return [f"{major}{minor}" for major, minor in sorted(found)]
    return list(ARCHITECTURES)


def import_torch() -> Path:
    """The directory of a torch that has the stable ABI."""
    # pip's build isolation takes the environment's packages off sys.path; what is built is for that environment's torch
    for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        if path not in sys.path:
            sys.path.append(path)
    try:
        import torch
    except ImportError:
        raise CannotBuildError(
            "the build environment has no torch; install torch first, then hdet with --no-build-isolation"
        ) from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
        raise CannotBuildError(f"torch {torch.__version__} has no stable ABI; it came with 2.10")
    return Path(torch.__file__).parent


def torch_includes() -> list[str]:
    return ["-isystem", str(import_torch() / "include")]


def link_flags() -> list[str]:
    # No rpath: torch is imported first, and its libraries are then found by name.
    undefined = [] if sys.platform == "darwin" else ["-Wl,-z,defs"]
    return ["-shared", *undefined, f"-L{import_torch() / 'lib'}"]


def compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    raise CannotBuildError("no C++ compiler; set CXX or install g++")


def find_nvcc() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [f"{home}/bin/nvcc" for home in homes if home] + ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((Path(path) for name in found if (path := shutil.which(name))), None)


def nvcc_version(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ")[1].split(",")[0]


def run(first: str | Path, *rest: str | Path) -> None:
    command = [*str(first).split(), *map(str, rest)]  # CXX may be "ccache g++"
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotBuildError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    command, target = sys.argv[1:]
    try:
        {"check": check_cuda, "emulate": emulate_cuda}[command](Path(target))
    except CannotBuildError as reason:
        sys.exit(str(reason))
