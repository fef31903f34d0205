"""Builds the native codec: one C-ABI shared library, loaded with ctypes, so one wheel serves every Python."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NATIVE = ROOT / "cachegen" / "native"
CXXFLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]


class BuildNative(build_ext):
    """Compile with the C++ compiler itself: no Python headers, no Python version in the name."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        if shutil.which(compiler[0]) is None:
            raise SystemExit(
                f"cachegen: no C++ compiler ({compiler[0]}) was found: install g++ (or set CXX), or install a wheel"
            )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        flags = CXXFLAGS + shlex.split(os.environ.get("CXXFLAGS", ""))
        built = []
        for source in ext.sources:
            built.append(str(objects / (Path(source).stem + ".o")))
            self._run([*compiler, *flags, "-c", source, "-o", built[-1]])
        self._run([*compiler, "-shared", *built, "-o", str(target), "-pthread"])

    def _run(self, command: list[str]) -> None:
        print("+", shlex.join(command), flush=True)
        subprocess.run(command, check=True, cwd=ROOT)


sources = sorted(str(p.relative_to(ROOT)) for p in NATIVE.glob("*.cpp"))
depends = sorted(str(p.relative_to(ROOT)) for p in NATIVE.glob("*.h"))
setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[Extension("cachegen.native._native", sources, depends=depends)],
)
