"""C++ for decoding on CPUs, built for this machine at first use: what plain torch cannot bring to memory's speed.

Every op here has a torch form beside its caller, which is used where there is no compiler. Libraries are kept in
~/.cache/edifice (XDG_CACHE_HOME) under a name made of the sources, torch and the processor, and built once for each.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
FLAGS = ("-O3", "-march=native", "-std=c++20", "-fPIC", "-fopenmp", "-DAT_PARALLEL_OPENMP=1", "-Wno-psabi", "-w")
log = logging.getLogger(__name__)


@cache
def available() -> bool:
    """Whether the ops of `torch.ops.edifice_cpu` are there; builds and loads them at the first call."""
    try:
        torch.ops.load_library(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (error.stderr or "").strip().splitlines() if isinstance(error, subprocess.SubprocessError) else [error]
        log.warning("kernels for this CPU were not built, plain torch is used: %s", detail[-1] if detail else error)
        return False
    from kernels.cpu import fakes  # noqa: F401 - registers them

    return True


def serves(*tensors: Tensor | None) -> bool:
    """Whether C++ takes a call: nothing records it, and all its numbers are float32 or bfloat16 on a CPU."""
    if not torch.is_inference_mode_enabled():
        return False
    given = [x for x in tensors if x is not None]
    return all(x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) for x in given) and available()


def _built() -> Path:
    """The library's file, compiled unless it exists. OSError or SubprocessError when it cannot be."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edifice"
    library = folder / f"{_key(*SOURCES)}.so"
    if library.exists():
        return library
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler; install g++ or set CXX")
    folder.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the others that start now wait for this build
        if not library.exists():
            log.info("building kernels for this CPU, once (about a minute)")
            _compile(compiler, folder, library)
    return library


def _compile(compiler: str, folder: Path, library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    include = [f"-I{path}" for path in include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"

    def run(*command: str) -> None:
        subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=600)

    objects = [folder / f"{source.stem}.{_key(source)}.o" for source in SOURCES]

    def compiled(source: Path, target: Path) -> None:
        if not target.exists():  # of an earlier build, in which another source was different
            part = target.with_suffix(".part")
            run(*FLAGS, abi, *include, "-c", str(source), "-o", str(part))
            part.rename(target)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compiled, SOURCES, objects))
    part = library.with_suffix(".part")
    paths = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    # No libgomp of our own beside torch's: two pools of threads would fight for the cores.
    run("-shared", "-o", str(part), *map(str, objects), *paths, "-lc10", "-ltorch_cpu", "-ltorch")
    part.rename(library)  # at once: a reader sees all of it or nothing


@cache
def _key(*sources: Path) -> str:
    """Changes with everything that a build of these sources depends on."""
    digest = hashlib.sha256(" ".join((*FLAGS, torch.__version__, platform.machine(), _processor())).encode())
    for path in (*sources, *sorted(Path(__file__).parent.glob("*.h"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What instructions this processor has."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
