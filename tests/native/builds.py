"""Builds of the native library for tests: the AVX-512 source through SIMDe, and all sources under sanitizers.

Each is a folder with a copy of the package beside its own `_native.so`: put it on PYTHONPATH and import cachegen. Kept
under build/native-tests, one per state of the sources.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "cachegen" / "native"
HERE = Path(__file__).resolve().parent
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
SANITIZE = ("-O1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def compiler() -> str:
    """The C++ compiler that setup.py would take."""
    return os.environ.get("CXX", "g++")


def simde_include() -> Path | None:
    """Where the SIMDe headers lie (package cmeel-simde, extra `isa`), or None."""
    for folder in [*site.getsitepackages(), sysconfig.get_path("purelib")]:
        include = Path(folder) / "cmeel.prefix" / "include"
        if (include / "simde" / "x86" / "avx512.h").exists():
            return include
    return None


def simde_package() -> Path:
    """The package with AVX-512 through SIMDe, no instruction beyond the compiler's default allowed in it."""
    include = simde_include()
    if include is None:
        raise FileNotFoundError("SIMDe's headers are missing: pip install 'cachegen[isa]'")
    special = {"coder_avx512.cpp": ("-O1", "-w", f"-I{HERE}", f"-I{NATIVE}", f"-I{include}")}
    return _package("simde", ("-O2", "-DCACHEGEN_SIMDE"), special)


def sanitized_package() -> Path:
    """The package under the address and undefined-behaviour sanitizers; run it with `sanitizer_environment()`."""
    return _package("sanitized", SANITIZE, {})


def sanitized_program(source: Path) -> Path:
    """A program of one source and the whole library, under the sanitizers."""
    objects = _objects("sanitized", SANITIZE, {})
    target = objects / (source.stem + "-" + _digest([source], SANITIZE))
    if not target.exists():
        _run([compiler(), *FLAGS, *SANITIZE, f"-I{NATIVE}", str(source), *_object_files(objects), "-o", str(target)])
    return target


def sanitizer_environment() -> dict[str, str]:
    """What a Python process needs so that a sanitized library loads into it."""
    found = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def environment(package: Path, **more: str) -> dict[str, str]:
    """This process' environment with `package` first on PYTHONPATH."""
    return {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", **more}


def _digest(sources: Sequence[Path], flags: Sequence[str]) -> str:
    state = hashlib.sha256(" ".join(flags).encode())
    for path in sources:
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:16]


def _sources() -> list[Path]:
    return sorted([*NATIVE.glob("*.cpp"), *NATIVE.glob("*.h"), *HERE.glob("*.h")])


def _objects(kind: str, flags: Sequence[str], special: dict[str, Sequence[str]]) -> Path:
    folder = ROOT / "build" / "native-tests" / f"{kind}-{_digest(_sources(), flags)}"
    if folder.exists():
        return folder
    for old in folder.parent.glob(f"{kind}-*"):
        shutil.rmtree(old, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:

        def build(source: Path) -> None:
            options = [*flags, *special.get(source.name, ())]
            target = Path(work) / (source.stem + ".o")
            _run([compiler(), *FLAGS, *options, "-c", str(source), "-o", str(target)])

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            list(pool.map(build, sorted(NATIVE.glob("*.cpp"))))
        os.rename(work, folder)
        Path(work).mkdir()  # the context manager removes it
    return folder


def _object_files(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.o"))]


def _package(kind: str, flags: Sequence[str], special: dict[str, Sequence[str]]) -> Path:
    objects = _objects(kind, flags, special)
    package = objects / "package"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(
        ROOT / "cachegen", package / "cachegen", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.cpp", "*.h")
    )
    link = [flag for flag in flags if flag.startswith("-fsanitize")]
    target = package / "cachegen" / "native" / "_native.so"
    _run([compiler(), *FLAGS, *link, "-shared", *_object_files(objects), "-o", str(target)])
    return package


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout, done.stderr, file=sys.stderr)
        done.check_returncode()
