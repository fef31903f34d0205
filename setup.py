"""Builds the native codec: one C-ABI shared library, loaded with ctypes, so one wheel serves every Python.

No Python header is used and no CPU flag is given: each source file turns on the instructions it is written for, and
the library picks one at run time. The wheel's tag is therefore py3-none-<platform>, and the platform says which glibc
the library really asks for.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "cachegen" / "native"
CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
LDFLAGS = ["-shared", "-pthread", "-Wl,-z,defs", f"-Wl,--version-script={NATIVE / 'exports.map'}"]
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libpthread.so.0", "libstdc++.so.6", "libgcc_s.so.1"}
# PEP 600's promise for C++: the newest symbols of libstdc++ (GLIBCXX_3.4.x, CXXABI_1.3.x) of systems with glibc 2.y.
CXX_OF_GLIBC = {17: (19, 7), 24: (22, 10), 28: (24, 11), 31: (28, 12), 34: (29, 13), 35: (30, 13), 39: (33, 15)}


class BuildNative(build_ext):
    """Compile with the C++ compiler itself: no Python headers, no Python version in the name.

    Objects are kept in build/native and reused while they are newer than their source and every header. Each file is
    written under a temporary name and renamed, so a process that loads the library never sees half of it.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        if shutil.which(compiler[0]) is None:
            raise SystemExit(
                f"cachegen: no C++ compiler ({compiler[0]}) was found: install g++ (or set CXX), or install a wheel"
            )
        flags = CXXFLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        link = LDFLAGS + shlex.split(os.environ.get("LDFLAGS", ""))
        key = hashlib.sha256(shlex.join([*compiler, *flags]).encode()).hexdigest()[:12]
        objects = ROOT / "build" / "native" / key
        objects.mkdir(parents=True, exist_ok=True)
        headers = max((path.stat().st_mtime for path in map(Path, ext.depends)), default=0.0)

        def compile_one(source: str) -> str:
            made = objects / f"{Path(source).stem}.o"
            if not made.exists() or made.stat().st_mtime <= max(headers, Path(source).stat().st_mtime):
                self._write(made, [*compiler, *flags, "-c", source])
            return str(made)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = list(pool.map(compile_one, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        self._write(target, [*compiler, *built, *link])

    def copy_extensions_to_source(self) -> None:
        """In place (editable installs): copied whole, for the same reason."""
        for ext in self.extensions:
            built, target = (
                Path(self.build_lib, self.get_ext_filename(ext.name)),
                ROOT / self.get_ext_filename(ext.name),
            )
            partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
            shutil.copy2(built, partial)
            partial.replace(target)

    def _write(self, target: Path, command: list[str]) -> None:
        """Run a command that makes `target`, which appears whole or not at all."""
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        command = [*command, "-o", str(partial)]
        self.announce(shlex.join(command), level=2)
        began = time.time()
        try:
            subprocess.run(command, check=True, cwd=ROOT)
            os.utime(partial, (began, began))  # a source saved meanwhile is newer
            partial.replace(target)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"cachegen: the native code did not build: {shlex.join(error.cmd)}") from None
        finally:
            partial.unlink(missing_ok=True)


class NativeWheel(bdist_wheel):
    """A wheel for any Python 3 on this platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        library = Path(self.get_finalized_command("build").build_lib, "cachegen", "native", "_native.so")
        machine = re.fullmatch(r"linux_(\w+)", platform)
        glibc = glibc_needed(library) if machine and library.exists() else None
        if machine and glibc:
            platform = f"manylinux_{glibc[0]}_{glibc[1]}_{machine[1]}"
        return "py3", "none", platform


def glibc_needed(library: Path) -> tuple[int, int] | None:
    """The oldest glibc whose systems can load `library` (PEP 600), or None if that can't be promised.

    libstdc++ is not linked in: torch needs the system's anyway, and its code in here would ask for a newer glibc. No
    promise where the library needs more than the system's own, or where binutils isn't there to ask.
    """
    if shutil.which("objdump") is None:
        return None
    told = subprocess.run(["objdump", "-p", str(library)], check=True, capture_output=True, text=True).stdout
    if not set(re.findall(r"NEEDED\s+(\S+)", told)) <= SYSTEM_LIBRARIES:
        return None

    def newest(prefix: str) -> int:
        return max(map(int, re.findall(rf"\b{re.escape(prefix)}(\d+)", told)), default=0)

    glibcxx, cxxabi = newest("GLIBCXX_3.4."), newest("CXXABI_1.3.")
    for_cxx = [glibc for glibc, (x, abi) in CXX_OF_GLIBC.items() if glibcxx <= x and cxxabi <= abi]
    return (2, max(newest("GLIBC_2."), for_cxx[0])) if for_cxx else None


# Relative paths: setuptools writes them into the sdist's manifest.
sources = sorted(str(path.relative_to(ROOT)) for path in NATIVE.glob("*.cpp"))
depends = sorted(str(path.relative_to(ROOT)) for path in [*NATIVE.glob("*.h"), NATIVE / "exports.map"])
os.chdir(ROOT)
setup(
    cmdclass={"build_ext": BuildNative, "bdist_wheel": NativeWheel},
    ext_modules=[Extension("cachegen.native._native", sources, depends=depends)],
)
