"""What every verb of `cachegen-bench` returns: one JSON document.

    {bench, version, git, host: {cpu, isa, cores, memory, device}, config, rows: [{...}], summary: {name: number}}

Documents are meant to be committed: they name the kind of machine, never the machine itself or its paths. `RowCache`
keeps finished rows of a long run, so that an interrupted one goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cachegen.errors import InputError, NativeMissing

GIB = 1 << 30


class Host(BaseModel):
    """The kind of machine: no names, no paths. `memory` is in GiB, `cores` are those this process may use."""

    model_config = ConfigDict(extra="forbid")

    cpu: str
    isa: str
    cores: int
    memory: float
    device: str = "cpu"

    @classmethod
    def here(cls, device: str = "cpu", isa: str | None = None) -> Host:
        """This machine. `isa`: what native code runs on, if the caller knows better than the coder itself."""
        return cls(cpu=_cpu_name(), isa=isa or coder_isa(), cores=usable_cores(), memory=_memory(), device=device)


class Result(BaseModel):
    """One run of one verb. `summary` maps names to numbers; None is "measured, but not defined here" (definitions)."""

    model_config = ConfigDict(extra="forbid")

    bench: str
    version: str
    git: str
    host: Host
    config: dict[str, Any]
    rows: list[dict[str, Any]] = Field(default_factory=list)
    summary: dict[str, float | None] = Field(default_factory=dict)

    @classmethod
    def new(cls, bench: str, config: Mapping[str, Any], host: Host | None = None) -> Result:
        """An empty result of `bench` on this machine; paths in `config` are cut to their last names."""
        return cls(
            bench=bench,
            version=package_version(),
            git=git_revision(),
            host=host or Host.here(),
            config=portable(config),
        )

    def to_json(self) -> str:
        """The document as text. Numbers that aren't finite become null."""
        return self.model_dump_json(indent=1) + "\n"

    def write(self, path: Path | str) -> None:
        """Write the document whole or not at all."""
        write_text(Path(path), self.to_json())

    @classmethod
    def read(cls, path: Path | str) -> Result:
        """Read a document. Raises InputError if it isn't one."""
        path = Path(path)
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"expected a result file of cachegen-bench; {path.name} doesn't exist") from error
        except (ValidationError, UnicodeDecodeError) as error:
            raise InputError(f"{path.name} isn't a result of cachegen-bench (--output writes one): {error}") from error


class RowCache:
    """Finished rows on disk, one JSON line each, by key: what lets an interrupted run resume.

    The file belongs to one configuration: its name carries the configuration's digest. A last line cut short by an
    interruption is ignored and written anew. `None` as folder keeps rows in memory only.
    """

    def __init__(self, folder: Path | None, bench: str, config: Mapping[str, Any]) -> None:
        self._rows: dict[str, dict[str, Any]] = {}
        self.path = None if folder is None else folder / f"{bench}-{digest(config)}.jsonl"
        if self.path is not None and self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue
                self._rows[entry["key"]] = entry["row"]

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def get(self, key: str) -> dict[str, Any] | None:
        """The row kept under `key`, or None."""
        return self._rows.get(key)

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a row, at once on disk."""
        self._rows[key] = dict(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_short = self.path.exists() and self.path.stat().st_size > 0 and not _ends_with_newline(self.path)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(("\n" if cut_short else "") + json.dumps({"key": key, "row": row}) + "\n")

    def forget(self) -> None:
        """Drop all rows: the run is complete, and its result holds what matters."""
        self._rows.clear()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def digest(config: Mapping[str, Any]) -> str:
    """16 hex digits that name a configuration, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_text(path: Path, text: str) -> None:
    """Write a text file by a temporary name and a rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def portable(value: Any) -> Any:
    """`value` as JSON-able data without this machine's paths: a path becomes its last name."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, str):
        return Path(value).name if os.path.isabs(value) else value
    if isinstance(value, Mapping):
        return {str(k): portable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(v) for v in value]
    return value


def package_version() -> str:
    """The installed version of cachegen."""
    try:
        return version("cachegen")
    except PackageNotFoundError:
        return "unknown"


def git_revision() -> str:
    """Short revision of the source tree, with `+` if it has uncommitted changes; `unknown` outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        revision = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return revision + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def _cpu_name() -> str:
    name = _cpuinfo("model name")
    return name or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def coder_isa() -> str:
    """The instruction set that the entropy coder uses in this process; the CPU's widest where it isn't built."""
    from cachegen.entropy import rans

    try:
        return rans.isa()
    except NativeMissing:
        return widest_isa()


def widest_isa() -> str:
    """The widest vector instructions of this CPU that the project has code for: avx512, avx2 or the machine's name."""
    flags = set(_cpuinfo("flags").split())
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        return "avx512"
    return "avx2" if "avx2" in flags else platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> float:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1)
    except (AttributeError, ValueError, OSError):
        return 0.0
