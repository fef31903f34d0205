"""`cachegen-bench quality`: what each scheme loses at each of its levels, against what it costs in bits.

Contexts are prefilled once; every scheme's version of the cache is then judged on the true text that follows, and on
questions about facts hidden in other contexts. Finished measurements are kept on disk until the run is complete, so
that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cachegen.errors import InputError

from .options import (
    ConfigFile,
    ExportConfig,
    Format,
    Output,
    OutputFormat,
    Quiet,
    Seed,
    calibration_bars,
    export,
    finish,
    is_default,
    options_in_force,
    progress,
)
from .results import Host, Result, RowCache

if TYPE_CHECKING:
    from torch import Tensor

    from cachegen.kv import KVChunk

    from .baselines import Scheme
    from .corpora import Context
    from .runner import Runner
    from .tasks import TaskContext

TARGETS = (0.01, 0.003)
DEFAULT_KL = 0.01
FLOOR = "noise_floor"
QUICK = {"contexts": 5, "tokens": 512, "cases": 20, "free_running": 0, "calibration_tokens": 4096}
"""What --quick asks for; any of them typed out wins."""


@dataclass(frozen=True)
class Plan:
    """What a run measures: see the verb's options. `following` true tokens after a context are what is compared on."""

    contexts: int = 20
    tokens: int = 1024
    following: int = 256
    cases: int = 280
    free_running: int = 4
    calibration_tokens: int = 32_768
    seed: int = 0


@dataclass(frozen=True)
class Setting:
    """A scheme at one of its levels."""

    scheme: Scheme
    level: str

    @property
    def key(self) -> str:
        return f"{self.scheme.name}/{self.level}"


# ---------------------------------------------------------------------------------------------------------- schemes
def parse_scheme(text: str) -> tuple[str, dict[str, Any]]:
    """`cachegen:delta=false:group_length=5` -> ("cachegen", {"delta": False, "group_length": 5})."""
    name, *pairs = text.split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--schemes: expected NAME or NAME:OPTION=VALUE; got {text!r}")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return name, options


def make_schemes(
    names: Sequence[str], model: Path, plan: Plan, tell: Callable[[str, int, int], None]
) -> dict[str, Scheme]:
    """Schemes by the names asked for; profiles are calibrated where needed. Raises InputError for an unknown one."""
    from cachegen.codecs import codec_ids

    from .baselines import BASELINES, make_scheme
    from .profiles import codec_for

    known = [*(baseline.name for baseline in BASELINES), *codec_ids()]
    parsed = {text: parse_scheme(text) for text in names}
    unknown = sorted({name for name, _ in parsed.values()} - set(known))
    if unknown:
        raise InputError(f"--schemes: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    made = {}
    for text, (name, options) in parsed.items():

        def codec(name: str, options: dict[str, Any] = options) -> Any:
            return codec_for(model, name, options, plan.calibration_tokens, plan.seed, tell)

        scheme = make_scheme(name, codec)
        scheme.name = text
        made[text] = scheme
    return made


# ------------------------------------------------------------------------------------------------------ measurements
class Study:
    """A run: a model, its contexts, the schemes' settings, and the measurements kept so far."""

    def __init__(
        self,
        runner: Runner,
        contexts: Sequence[Context],
        tasks: Sequence[TaskContext],
        settings: Sequence[Setting],
        rows: RowCache,
    ) -> None:
        self.runner, self.contexts, self.tasks, self.settings, self.rows = runner, contexts, tasks, settings, rows

    @property
    def steps(self) -> int:
        """Measurements of `texts` and `questions` together."""
        return (len(self.contexts) + len(self.tasks)) * (len(self.settings) + 1)

    def texts(self, step: Callable[[], None]) -> None:
        """Compare distributions over the text that follows each context."""
        for context in self.contexts:
            self._each(f"kl/{context.name}/{_short(context.ids)}", context.ids, self._compare_on(context), step)

    def questions(self, step: Callable[[], None]) -> None:
        """Ask every question of each task context."""
        for task in self.tasks:
            self._each(f"tasks/{task.name}", task.ids, self._ask(task), step)

    def _each(
        self,
        prefix: str,
        ids: Sequence[int],
        measure_on: Callable[[KVChunk, KVChunk], Callable[[str, KVChunk], dict[str, Any]]],
        step: Callable[[], None],
    ) -> None:
        """Measure every setting that isn't kept yet; the context is prefilled only if there is one."""
        measure: Callable[[str, KVChunk], dict[str, Any]] | None = None
        for setting in (None, *self.settings):
            key = f"{prefix}/{FLOOR if setting is None else setting.key}"
            if key not in self.rows:
                if measure is None:
                    computed = self.runner.prefill(ids)
                    chunk = self.runner.engine_chunk(computed)
                    measure = measure_on(chunk, computed)
                if setting is None:
                    self.rows.put(key, measure(FLOOR, computed))
                else:
                    coded = setting.scheme.apply(chunk, setting.level)
                    size = {
                        "nbytes": coded.nbytes,
                        "elements": chunk.elements,
                        "raw_bytes": chunk.nbytes,
                        "encode_s": coded.encode_s,
                        "decode_s": coded.decode_s,
                        "notes": list(coded.notes),
                    }
                    self.rows.put(key, {**size, **measure(setting.key, coded.chunk)})
            step()

    def _compare_on(self, context: Context) -> Callable[[KVChunk, KVChunk], Callable[[str, KVChunk], dict[str, Any]]]:
        import torch

        from .metrics import divergence

        targets = torch.tensor(context.continuation[1:], device=self.runner.device)

        def start(chunk: KVChunk, computed: KVChunk) -> Callable[[str, KVChunk], dict[str, Any]]:
            reference = self._logits(chunk, context)

            def measure(name: str, decoded: KVChunk) -> dict[str, Any]:
                found = divergence(reference, self._logits(decoded, context), targets)
                return {"kind": context.kind, "name": context.name, **vars(found)}

            return measure

        return start

    def _logits(self, chunk: KVChunk, context: Context) -> Tensor:
        return self.runner.continuation(self.runner.cache_of(chunk), context.continuation)

    def _ask(self, task: TaskContext) -> Callable[[KVChunk, KVChunk], Callable[[str, KVChunk], dict[str, Any]]]:
        names = [question.task for question in task.questions]

        def start(chunk: KVChunk, computed: KVChunk) -> Callable[[str, KVChunk], dict[str, Any]]:
            right = self._answers(chunk, task)

            def measure(name: str, decoded: KVChunk) -> dict[str, Any]:
                answers = right if name == FLOOR else self._answers(decoded, task)
                return {"tasks": names, "reference": right, "decoded": answers}

            return measure

        return start

    def _answers(self, chunk: KVChunk, task: TaskContext) -> list[bool]:
        return self.runner.answers(self.runner.cache_of(chunk), task.questions)

    def free_running(self, contexts: Sequence[Context], settings: Sequence[Setting], step: Callable[[], None]) -> None:
        """Generate greedily from the decoded caches of some settings, and from the untouched ones."""
        from .metrics import first_divergence

        for context in contexts:
            prefix = f"free/{context.name}/{_short(context.ids)}"
            wanted = [s for s in settings if f"{prefix}/{s.key}" not in self.rows]
            if wanted:
                chunk = self.runner.engine_chunk(self.runner.prefill(context.ids))
                prompt, size = context.continuation[:1], len(context.continuation) - 1

                def generate(version: KVChunk, prompt: Sequence[int] = prompt, size: int = size) -> list[int]:
                    return self.runner.greedy(self.runner.cache_of(version), prompt, size, stop=False)

                reference = generate(chunk)
                for setting in wanted:
                    found = generate(setting.scheme.apply(chunk, setting.level).chunk)
                    same = first_divergence(reference, found)
                    self.rows.put(f"{prefix}/{setting.key}", {"first_divergence": same, "equal": found == reference})
                    step()
            for _ in range(len(settings) - len(wanted)):
                step()

    # -------------------------------------------------------------------------------------------------- summing up
    def kept(self, prefix: str, key: str) -> list[dict[str, Any]]:
        """Kept measurements of one setting: "kl" (texts), "tasks" (questions) or "free" (free generation)."""
        return [
            row
            for name in self.rows
            if name.startswith(f"{prefix}/") and name.endswith(f"/{key}") and (row := self.rows.get(name)) is not None
        ]

    def row(self, scheme: str, level: str, key: str, seed: int) -> dict[str, Any]:
        """One row of the result: every measure of one setting."""
        from .metrics import bits_per_element, bootstrap_interval, paired, percentile, ratio
        from .tasks import solved_tasks

        texts = self.kept("kl", key)
        kl = [row["kl"] for row in texts]
        low, high = bootstrap_interval(kl, seed=seed)
        worst = max(texts, key=lambda row: row["kl"])
        found: dict[str, Any] = {"scheme": scheme, "level": level}
        if "nbytes" in texts[0]:
            nbytes, elements = _total(texts, "nbytes"), _total(texts, "elements")
            found |= {
                "bits_per_element": bits_per_element(nbytes, elements),
                "ratio": ratio(nbytes, _total(texts, "raw_bytes")),
            }
            for name in ("encode_s", "decode_s"):
                if texts[0][name] is not None:
                    found[name] = _total(texts, name) / len(texts)
            found["notes"] = sorted({note for row in texts for note in row["notes"]})
        found |= {
            "kl": _mean(kl),
            "kl_low": low,
            "kl_high": high,
            "kl_p95": percentile(kl, 0.95),
            "kl_worst": worst["kl"],
            "kl_worst_context": worst["name"],
            "kl_by_kind": {
                kind: _mean([row["kl"] for row in texts if row["kind"] == kind])
                for kind in dict.fromkeys(row["kind"] for row in texts)
            },
            "top1_agreement": _mean([row["top1_agreement"] for row in texts]),
            "nll_delta": _mean([row["nll_delta"] for row in texts]),
            "contexts": len(texts),
        }
        tasks = self.kept("tasks", key)
        if tasks:
            cases = [case for row in tasks for case in zip(row["tasks"], row["reference"], row["decoded"], strict=True)]
            counted = solved_tasks([(task, right) for task, right, _ in cases])
            pairs = [(before, after) for task, before, after in cases if task in counted]
            flips = paired([a for a, _ in pairs], [b for _, b in pairs])
            solved = sum(before for before, _ in pairs)
            found |= {
                "needle": (solved - flips.lost) / solved if solved else math.nan,
                "needle_cases": flips.cases,
                "needle_reference": flips.reference,
                "needle_decoded": flips.decoded,
                "needle_lost": flips.lost,
                "needle_gained": flips.gained,
                "needle_p": flips.p,
                "needle_by_task": {
                    task: _mean([float(after) for name, _, after in cases if name == task]) for task in counted
                },
                "needle_tasks": counted,
            }
        free = self.kept("free", key)
        if free:
            found |= {
                "first_divergence": median(row["first_divergence"] for row in free),
                "free_running_equal": _mean([float(row["equal"]) for row in free]),
            }
        return found


def _short(ids: Sequence[int]) -> str:
    """Tells the contexts of one file apart."""
    import hashlib

    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()[:8]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _total(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    return sum(row[name] for row in rows)


def default_level(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A scheme's level under the default plan: the cheapest measured one whose KL is at most 0.01."""
    good = [row for row in rows if row["kl"] <= DEFAULT_KL]
    return min(good, key=lambda row: float(row["bits_per_element"]))["level"] if good else None


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """bits_at_kl_X.scheme, needle.scheme.level, and how the paper's codec compares with the public code's."""
    from .metrics import bits_at_kl

    summary: dict[str, float | None] = {}
    schemes = [name for name in dict.fromkeys(str(row["scheme"]) for row in rows) if name != FLOOR]
    for target in TARGETS:
        for scheme in schemes:
            points = [(row["bits_per_element"], row["kl"]) for row in rows if row["scheme"] == scheme]
            summary[f"bits_at_kl_{target}.{scheme}"] = bits_at_kl(points, target)
        if {"cachegen", "cachegen_public"} <= set(schemes):
            ours, theirs = (summary[f"bits_at_kl_{target}.{name}"] for name in ("cachegen", "cachegen_public"))
            name = (
                "cachegen_over_public_at_equal_kl" if target == DEFAULT_KL else f"cachegen_over_public_at_kl_{target}"
            )
            summary[name] = ours / theirs if ours and theirs else None
    for row in rows:
        if row["scheme"] == FLOOR:
            summary["noise_floor_kl"] = row["kl"]
        elif "needle" in row:
            summary[f"needle.{row['scheme']}.{row['level']}"] = row["needle"]
    cases = [row["needle_cases"] for row in rows if "needle_cases" in row]
    if cases:
        summary["needle_cases"] = min(cases)
    return summary


# --------------------------------------------------------------------------------------------------------- the verb
def run(
    model: Path,
    schemes: Sequence[str],
    plan: Plan,
    text_files: Sequence[Path] = (),
    config: Mapping[str, Any] | None = None,
    quiet: bool = False,
    folder: Path | None = None,
    device: str = "cpu",
) -> Result:
    """Measure `schemes` on `model`. `folder` is where measurements are kept until the run is complete."""
    from . import corpora
    from .models import cache_folder
    from .profiles import source_digest
    from .runner import Runner
    from .tasks import task_contexts

    runner = Runner.load(model, device)
    contexts = corpora.contexts(
        runner.tokenizer, plan.contexts, plan.tokens, plan.following + 1, seed=plan.seed, files=text_files
    )
    tasks = task_contexts(runner.tokenizer, plan.cases, min(768, plan.tokens), plan.seed) if plan.cases else []
    texts = corpora.describe(contexts)
    with progress(quiet) as bar:
        made = make_schemes(schemes, model, plan, calibration_bars(bar))
        settings = [Setting(scheme, level) for scheme in made.values() for level in scheme.levels]
        kept_for = {"model": str(model), "schemes": list(schemes), **vars(plan), **texts, "code": source_digest()}
        rows = RowCache(folder or cache_folder() / "bench", "quality", kept_for)
        study = Study(runner, contexts, tasks, settings, rows)
        bar_task = bar.add_task("measuring", total=study.steps)
        study.texts(lambda: bar.advance(bar_task))
        study.questions(lambda: bar.advance(bar_task))
        table = [study.row(s.scheme.name, s.level, s.key, plan.seed) for s in settings]
        if plan.free_running:
            chosen = {name: default_level([row for row in table if row["scheme"] == name]) for name in made}
            defaults = [s for s in settings if chosen[s.scheme.name] == s.level and s.scheme.name != "bf16"]
            sample = contexts[: plan.free_running]
            free_task = bar.add_task("free-running", total=len(sample) * len(defaults))
            study.free_running(sample, defaults, lambda: bar.advance(free_task))
            table = [study.row(s.scheme.name, s.level, s.key, plan.seed) for s in settings]
    floor = study.row(FLOOR, "fp32", FLOOR, plan.seed)
    settings_used = {**(config or {}), **vars(plan), "model": model.name, "texts": texts}
    result = Result.new("quality", settings_used, Host.here(device))
    result.config["profiles"] = {name: _profile_of(scheme) for name, scheme in made.items() if _profile_of(scheme)}
    result.rows = [floor, *table]
    result.summary = summarise(result.rows)
    rows.forget()
    return result


def _profile_of(scheme: Scheme) -> str | None:
    profile = getattr(getattr(scheme, "codec", None), "profile", None)
    return None if profile is None else str(profile.hash)


def show(result: Result, console: Console) -> None:
    """Print a result's rows and its bits at equal KL; narrow terminals get the columns that matter most."""
    cases = result.summary.get("needle_cases")
    title = f"{result.config['model']}: {result.config['contexts']} contexts of {result.config['tokens']} tokens"
    console.print(f"\n[bold]{title}[/]" + (f", {cases:.0f} retrieval cases" if cases else ""))
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("scheme", lambda row: str(row["scheme"])),
        ("level", lambda row: str(row["level"])),
        ("bits", lambda row: _shown(row.get("bits_per_element"), ".2f")),
        ("ratio", lambda row: _shown(row.get("ratio"), ".1f")),
        ("KL", lambda row: _shown(row["kl"], ".2g")),
        ("worst", lambda row: _shown(row["kl_worst"], ".2g")),
        ("top-1", lambda row: _shown(row["top1_agreement"], ".3f")),
        ("needle", lambda row: _shown(row.get("needle"), ".3f")),
    ]
    if console.width >= 110:
        columns[5:5] = [
            ("95 %", lambda row: f"{row['kl_low']:.2g} .. {row['kl_high']:.2g}"),
            ("p95", lambda row: _shown(row["kl_p95"], ".2g")),
        ]
        columns += [
            ("NLL", lambda row: _shown(row["nll_delta"], "+.4f")),
            ("diverges at", lambda row: _shown(row.get("first_divergence"), ".0f")),
        ]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, _ in columns:
        table.add_column(name, justify="left" if name in ("scheme", "level") else "right", no_wrap=True)
    for row, following in zip(result.rows, [*result.rows[1:], None], strict=True):
        last = following is None or following["scheme"] != row["scheme"]
        table.add_row(*(cell(row) for _, cell in columns), end_section=last)
    console.print(table)
    targets = Table(title="Bits per element at equal KL", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    targets.add_column("scheme")
    for target in TARGETS:
        targets.add_column(f"KL {target}", justify="right")
    for scheme in dict.fromkeys(str(row["scheme"]) for row in result.rows if row["scheme"] != FLOOR):
        bits = [result.summary[f"bits_at_kl_{target}.{scheme}"] for target in TARGETS]
        targets.add_row(scheme, *(_shown(value, ".2f") for value in bits))
    console.print(targets)
    if cases and cases < 200:
        console.print(f"[yellow]{cases:.0f} retrieval cases: too few to judge by; a full run has at least 200[/]")


def _shown(value: Any, form: str) -> str:
    return "-" if value is None or (isinstance(value, float) and math.isnan(value)) else format(value, form)


def command(app: typer.Typer) -> None:
    """Add the verb `quality`."""

    @app.command()
    def quality(
        context: typer.Context,
        model: Annotated[
            Path | None,
            typer.Option("--model", help="A transformers or GGUF folder. Default: SmolLM2-135M-Instruct."),
        ] = None,
        schemes: Annotated[
            str | None,
            typer.Option(
                "--schemes", help="Comma-separated; options after colons: cachegen:delta=false. Default: all."
            ),
        ] = None,
        contexts: Annotated[int, typer.Option("--contexts", min=1, help="Contexts to compress.")] = Plan.contexts,
        tokens: Annotated[int, typer.Option("--tokens", min=16, help="Tokens of a context.")] = Plan.tokens,
        following: Annotated[
            int, typer.Option("--following", min=1, help="True tokens after it on which distributions are compared.")
        ] = Plan.following,
        text_file: Annotated[
            list[Path] | None,
            typer.Option("--text-file", help="Evaluate on this text instead (repeatable)."),
        ] = None,
        cases: Annotated[int, typer.Option("--cases", min=0, help="Retrieval cases, at least.")] = Plan.cases,
        free_running: Annotated[
            int, typer.Option("--free-running", min=0, help="Contexts to generate from freely, at the default levels.")
        ] = Plan.free_running,
        calibration_tokens: Annotated[
            int, typer.Option("--calibration-tokens", min=256, help="Tokens that codecs with a profile learn from.")
        ] = Plan.calibration_tokens,
        device: Annotated[
            str, typer.Option("--device", help="Where the model runs, e.g. cuda. Codecs run on the CPU.")
        ] = "cpu",
        quick: Annotated[
            bool, typer.Option("--quick", help="A few minutes: fewer, shorter contexts and cases.")
        ] = False,
        seed: Seed = 0,
        format: Format = OutputFormat.TERMINAL,
        output: Output = None,
        config: ConfigFile = None,
        export_config: ExportConfig = None,
        quiet: Quiet = False,
    ) -> None:
        """Bits per element against loss, for every scheme and level.

        The context is compressed; the true tokens that follow it are not. KL is between the next-token distributions
        after the untouched bf16 cache and after the decoded one, the model in fp32. Retrieval asks for facts hidden
        in other contexts. docs/guide/bench.md explains every column.

        A first look at two schemes, then everything:

            cachegen-bench quality --quick --schemes channel,int

            cachegen-bench quality --output quality.json
        """
        export(context, export_config)
        from .baselines import DEFAULT_SCHEMES
        from .models import smollm2

        options = options_in_force(context)
        if quick:
            typed = {name for name in QUICK if not is_default(context, name)}
            options |= {name: value for name, value in QUICK.items() if name not in typed}
        plan = Plan(**{name: options[name] for name in Plan.__dataclass_fields__})
        chosen = list(DEFAULT_SCHEMES) if schemes is None else [s.strip() for s in schemes.split(",") if s.strip()]
        known = options | {"schemes": chosen}
        result = run(model or smollm2(), chosen, plan, text_file or (), known, quiet, device=device)
        finish(result, format, output, lambda console: show(result, console), quiet)
