"""The compiled kernels: built at first use with the C++ compiler that is there, and kept for later starts.

Without a compiler, on another CPU or platform, or where the cache folder cannot be written there is none, and one line
says why. The source needs no header of torch: nothing but the compiler, and a few seconds.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from huggingface_hub import constants

from runtime.errors import one_line

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "source"
SOURCE = FOLDER / "kernels.cpp"
HEADERS = sorted(FOLDER.glob("*.h"))
CPU_FLAGS = frozenset(("avx512f", "avx512bw", "avx512vl", "avx512_bf16"))
# No contraction: a product and a sum are rounded apart, as in the operations that these repeat.
COMPILE = ["-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off"]
COMPILE += ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma", "-mamx-tile", "-mamx-bf16"]
SECONDS = 120


class Unavailable(Exception):
    """The kernels cannot be had here; says why in a line."""


def native_library() -> ctypes.CDLL | None:
    """The kernels; None where they cannot be had."""
    return _once()[0]


@cache
def has_tiles() -> bool:
    """Whether there are kernels, and tiles (AMX) for them."""
    library = native_library()
    return library is not None and "amx_bf16" in _cpu_flags() and bool(library.specbound_tiles())


def why_not_native() -> str | None:
    """Why there are no kernels, in a line; None where there are."""
    return _once()[1]


@cache
def _once() -> tuple[ctypes.CDLL | None, str | None]:
    """The kernels, or why there are none; built and loaded at most once in a process."""
    try:
        return _load(), None
    except Unavailable as error:
        logger.info("no native kernels: %s", error)
        return None, str(error)


def _load() -> ctypes.CDLL:
    """Build what is not built yet, load it, and declare its functions.

    Raises:
        Unavailable: not on this machine.
    """
    if missing := _missing():
        raise Unavailable(missing)
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    source = b"".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    key = repr((torch.__version__, COMPILE, platform.machine())).encode() + source
    path = Path(constants.HF_HOME) / "specbound" / f"native-{hashlib.sha256(key).hexdigest()[:32]}.so"
    try:
        if not path.is_file():
            if compiler is None:
                raise Unavailable("there is no C++ compiler (g++)")
            _build(compiler, path)
        library = ctypes.CDLL(str(path))
        _declare(library)
    except (OSError, AttributeError) as error:
        raise Unavailable(one_line(error)) from error
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Arguments and results of its functions."""
    floats = ctypes.POINTER(ctypes.c_float)
    place, number, numbers = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)
    products, layers = library.specbound_products, library.specbound_layers
    products.argtypes, products.restype = [*[place] * 4, *[number] * 7], None
    library.specbound_singles.argtypes, library.specbound_singles.restype = [*[place] * 4, *[number] * 6], None
    for attention in (library.specbound_attention, library.specbound_attention_singles):
        attention.argtypes, attention.restype = [*[place] * 4, numbers, place, ctypes.c_float, number, number], number
    reading = library.specbound_reading
    reading.argtypes, reading.restype = [*[place] * 4, numbers, ctypes.c_float, number], number
    layers.restype, layers.argtypes = number, [*[place] * 3, numbers, floats, *[place] * 4, number]
    before, after = library.specbound_before, library.specbound_after
    before.restype, before.argtypes = None, [place, numbers, floats, *[place] * 7, number]
    after.restype, after.argtypes = None, [place, numbers, floats, *[place] * 4, number]
    norms = library.specbound_norms
    norms.argtypes, norms.restype = [*[place] * 3, number, number, ctypes.c_float, number], None
    draft, keep = library.specbound_draft, library.specbound_keep
    draft.argtypes, draft.restype = [place, numbers, floats, *[place] * 7, number], None
    keep.argtypes, keep.restype = [place, numbers, place], None
    library.specbound_tiles.argtypes, library.specbound_tiles.restype = [], number
    step, likeliest = library.specbound_head_step, library.specbound_likeliest
    step.argtypes, step.restype = [place, place, numbers, floats, *[place] * 8, number], number
    likeliest.argtypes, likeliest.restype = [place, numbers, ctypes.c_float, *[place] * 3, number], None


def _missing() -> str | None:
    """What this machine lacks, if anything."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they are for Linux on x86_64, not {platform.system()} on {platform.machine()}"
    try:
        lacking = sorted(CPU_FLAGS - _cpu_flags())
    except OSError as error:
        return one_line(error)
    return f"the CPU has no {', '.join(lacking)}" if lacking else None


def _cpu_flags() -> set[str]:
    """What Linux says the CPU can do."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def _build(compiler: str, path: Path) -> None:
    """Compile to a file of its own and move it into place: two processes at once do no harm.

    Linked with torch's library for the one thing taken from it: its OpenMP, so that both use the same threads.

    Raises:
        Unavailable: with the compiler's last line.
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch_libraries = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="native-") as folder:
        built = Path(folder, "kernels.so")
        object_ = str(Path(folder, "kernels.o"))
        compile_ = [compiler, *COMPILE, "-c", str(SOURCE), "-o", object_]
        # Without -fopenmp: it would bring a second OpenMP, with threads of its own that fight torch's for the cores.
        link = [compiler, "-shared", object_, "-o", str(built), f"-L{torch_libraries}"]
        link += ["-Wl,--no-as-needed", "-ltorch_cpu"]
        for command in (compile_, link):
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
            except subprocess.CalledProcessError as error:
                lines = (error.stderr or "").strip().splitlines() or [f"exit status {error.returncode}"]
                raise Unavailable(f"{compiler} failed: {lines[-1]}") from error
            except subprocess.TimeoutExpired as error:
                raise Unavailable(f"{compiler} took over {SECONDS} seconds") from error
        os.replace(built, path)
