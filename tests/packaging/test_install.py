"""Wheel, sdist and editable install, each in a fresh environment, and what is said where nothing can be built.

The environments borrow torch and the other dependencies from the one that runs the tests, by a path file: only
cachegen itself is installed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import cachegen, cachegen.evaluation, cachegen.streaming, cachegen.codec_cuda, cachegen.native
assert cachegen.native.crc32c(b"123456789") == 0xE3069283
print(cachegen.__file__)
"""

pytestmark = pytest.mark.long


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(folder: Path) -> Path:
    """A fresh virtual environment's Python, with this environment's dependencies but not its cachegen."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def without_compiler(folder: Path) -> dict[str, str]:
    """An environment whose PATH holds no compiler."""
    folder.mkdir()
    for tool in ("sh", "env", "uname"):
        found = shutil.which(tool)
        assert found
        (folder / tool).symlink_to(found)
    return {**{k: v for k, v in os.environ.items() if k not in ("CXX", "CC")}, "PATH": str(folder)}


def pip(python: Path, *arguments: str | Path) -> list[str | Path]:
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed"]
    return [python, "-m", "pip", "install", *options, *arguments]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, so that nothing is built beside the tests' own library."""
    folder = tmp_path_factory.mktemp("source")
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).exists():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return folder


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, source)
    return next(folder.glob("cachegen-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that the sdist is shown to be enough."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sdist)
    return next(folder.glob("cachegen-*.whl"))


def test_sdist_holds_sources_tests_and_docs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = set(run("git", "ls-files", cwd=ROOT).split())
    wanted = {n for n in tracked if n.startswith(("cachegen/", "evaluation/", "streaming/", "codec_cuda/", "tests/"))}
    assert wanted <= names
    assert {"README.md", "LICENSE", "Makefile", ".ci/run", "docs/architecture.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_wheel_names_no_python_version(wheel: Path) -> None:
    python, abi, platform = wheel.stem.split("-")[-3:]
    assert (python, abi) == ("py3", "none")
    assert platform != "any"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "cachegen/native/_native.so" in names
    assert "cachegen/py.typed" in names
    assert not [name for name in names if name.endswith(".cpp") or name.startswith(("tests", "streaming"))]


def test_wheel_installs_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    env = without_compiler(tmp_path / "path")
    run(*pip(python, wheel), env=env)
    assert str(tmp_path) in run(python, "-c", CHECK, cwd=tmp_path, env=env)


def test_source_installs(source: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    run(*pip(python, source))
    assert str(tmp_path) in run(python, "-c", CHECK, cwd=tmp_path)


def test_editable_install_follows_the_source(source: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    run(*pip(python, "-e", source))
    assert str(source) in run(python, "-c", CHECK, cwd=tmp_path)


def test_no_compiler_is_said_in_one_line(source: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    command = [str(part) for part in pip(python, source)]
    done = subprocess.run(command, env=without_compiler(tmp_path / "path"), capture_output=True, text=True)
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if "cachegen: " in line]
    assert done.returncode != 0
    assert said == [
        "cachegen: no C++ compiler (g++) was found: install g++ (or set CXX), or install a wheel",
    ]


@pytest.mark.skipif(shutil.which("nm") is None, reason="binutils isn't installed")
def test_library_shows_its_own_names_only(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("cachegen/native/_native.so", tmp_path)
    names = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()]
    assert names
    assert [name for name in names if not name.startswith("cg_")] == []
