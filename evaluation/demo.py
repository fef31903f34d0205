"""`cachegen-bench demo`: a real model answers questions on a long text from a cache that was stored in fewer bytes.

SmolLM2-135M-Instruct reads a handbook of 1,500 tokens once. Its cache is then encoded by each codec at a few levels,
saved to a store, read back, decoded into a new cache, and asked the same questions as the untouched one.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    options_in_force,
    progress,
)
from .results import Result, RowCache

if TYPE_CHECKING:
    from torch import Tensor

    from cachegen.codec import Codec
    from cachegen.kv import KVChunk

    from .runner import Runner

HANDBOOK = Path(__file__).parent / "texts" / "handbook.txt"
QUESTIONS = (
    "What is the name of the dog?",
    "On which day does the boat come?",
    "What is the name of the goat?",
    "Where does the harness hang?",
)
"""Asked of the handbook, whose untouched cache answers all four."""
CODECS = ("lossless", "channel", "cachegen")
CALIBRATION_TOKENS = 4096
ANSWER_TOKENS = 32


def context_text(text: str) -> str:
    """A text as the first part of a user's turn, so that the question after it ends the same turn."""
    return f"<|im_start|>user\n{text.strip()}\n\n"


def question_text(question: str) -> str:
    """The rest of the turn."""
    return f"Answer in one short sentence. {question}<|im_end|>\n<|im_start|>assistant\n"


def chosen_levels(codec: Codec) -> list[int]:
    """A coarse level, the default one and a fine one, as far as they differ."""
    default, top = codec.default_level, codec.num_levels - 1
    return sorted({default // 2, default, (default + top + 1) // 2})


class Demonstration:
    """A context that was read once, the untouched answers, and what codecs make of both.

    Attributes:
        ids: token ids of the context.
        chunk: its cache as an engine holds it (bf16).
        prefill_s: seconds the model took to read it.
        answers: the untouched answers' texts.
    """

    def __init__(self, runner: Runner, text: str, questions: Sequence[str]) -> None:
        self.runner = runner
        self.ids = self._encode(context_text(text))
        self.prompts = [self._encode(question_text(question)) for question in questions]
        began = time.perf_counter()
        computed = runner.prefill(self.ids)
        self.prefill_s = time.perf_counter() - began
        self.chunk = runner.engine_chunk(computed)
        cache = runner.cache_of(self.chunk)
        self.answer_ids = [runner.greedy(cache, prompt, ANSWER_TOKENS) for prompt in self.prompts]
        self.answers = [self._decode(ids) for ids in self.answer_ids]
        self.reference = self._logits(self.chunk)

    def _encode(self, text: str) -> list[int]:
        return list(self.runner.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.runner.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _logits(self, chunk: KVChunk) -> Tensor:
        """What the model expects after each token of the questions and their untouched answers."""
        import torch

        cache = self.runner.cache_of(chunk)
        turns = [[*prompt, *answer] for prompt, answer in zip(self.prompts, self.answer_ids, strict=True)]
        return torch.cat([self.runner.continuation(cache, turn) for turn in turns])

    def measure(self, codec: Codec, level: int, url: str) -> dict[str, Any]:
        """Save the cache at a level, load it from the store, and answer from what came back."""
        import torch

        from cachegen.kvstore import KVStore

        from .metrics import bits_per_element, divergence, ratio

        name = codec.codec.codec_id
        with KVStore(codec, url, level=level) as store:
            saved = store.save(self.ids, self.chunk)
            # The prompt goes on after the context: a cache must never cover all of it.
            loaded = store.load([*self.ids, *self.prompts[0]], model=self.runner.model)
        if loaded.num_tokens != len(self.ids) or loaded.chunk is None:
            problems = "; ".join(map(str, loaded.problems)) or "it wasn't found"
            raise InputError(
                f"demo: expected all {len(self.ids)} tokens back from {url}; got {loaded.num_tokens} ({problems}). "
                "Use an empty store"
            )
        cache = self.runner.cache_of(loaded.chunk)
        answers = [self._decode(self.runner.greedy(cache, prompt, ANSWER_TOKENS)) for prompt in self.prompts]
        targets = torch.tensor([i for p, a in zip(self.prompts, self.answer_ids, strict=True) for i in [*p, *a][1:]])
        found = divergence(self.reference, self._logits(loaded.chunk), targets.to(self.reference.device))
        return {
            "codec": name,
            "level": level,
            "default": level == codec.default_level,
            "bytes": loaded.bytes_read,
            "bits_per_element": bits_per_element(loaded.bytes_read, self.chunk.elements),
            "ratio": ratio(loaded.bytes_read, self.chunk.nbytes),
            "encode_s": saved.seconds["encode"],
            "store_s": saved.seconds["store"],
            "fetch_s": loaded.seconds["fetch"],
            "decode_s": loaded.seconds["decode"],
            "load_s": loaded.seconds["total"],
            "kl": found.kl,
            "top1_agreement": found.top1_agreement,
            "answers": answers,
            "same_answers": sum(a == b for a, b in zip(answers, self.answers, strict=True)),
        }


def run(
    codecs: Sequence[str] = CODECS,
    text_file: Path | None = None,
    questions: Sequence[str] = QUESTIONS,
    store: str | None = None,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> Result:
    """The demonstration as a result. `store` is a store's URL; default a folder that is gone afterwards."""
    from .models import cache_folder, smollm2
    from .profiles import codec_for, source_digest
    from .runner import Runner

    text = HANDBOOK.read_text(encoding="utf-8") if text_file is None else read_text(text_file)
    with ExitStack() as stack:
        bar = stack.enter_context(progress(quiet))
        reading = bar.add_task("reading the text", total=1)
        model = smollm2()
        runner = Runner.load(model)
        shown = Demonstration(runner, text, questions)
        bar.update(reading, completed=1)
        if store is None:
            store = "file:" + stack.enter_context(tempfile.TemporaryDirectory(prefix="cachegen-demo-"))
        tell: Callable[[str, int, int], None] = calibration_bars(bar)
        made = [codec_for(model, name, tokens=CALIBRATION_TOKENS, seed=seed, progress=tell) for name in codecs]
        plan = [(codec, level) for codec in made for level in chosen_levels(codec)]
        kept_for = {"codecs": list(codecs), "text": text, "questions": list(questions), "seed": seed}
        rows = RowCache(cache_folder() / "bench", "demo", {**kept_for, "code": source_digest()})
        encoding = bar.add_task("encode, store, load, answer", total=len(plan))
        table = []
        for codec, level in plan:
            key = f"{codec.codec.codec_id}/{level}"
            row = rows.get(key)
            if row is None:
                row = shown.measure(codec, level, store)
                rows.put(key, row)
            table.append(row)
            bar.advance(encoding)
    result = Result.new("demo", {**(config or {}), "model": model.name, "tokens": len(shown.ids), "seed": seed})
    untouched = {
        "codec": "untouched",
        "level": None,
        "bytes": shown.chunk.nbytes,
        "bits_per_element": 8 * shown.chunk.nbytes / shown.chunk.elements,
        "ratio": 1.0,
        "kl": 0.0,
        "questions": list(questions),
        "answers": shown.answers,
        "same_answers": len(questions),
    }
    result.rows = [untouched, *table]
    result.summary["prefill_s"] = shown.prefill_s
    for row in table:
        name = f"{row['codec']}.{row['level']}"
        for figure in ("ratio", "bits_per_element", "kl", "load_s", "same_answers"):
            result.summary[f"{figure}.{name}"] = row[figure]
        result.summary[f"prefill_over_load.{name}"] = shown.prefill_s / row["load_s"]
    rows.forget()
    return result


def read_text(file: Path) -> str:
    """A user's text. Raises InputError if it can't be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"--text-file: expected a text file; {file.name} can't be read: {error.strerror}") from error


def show(result: Result, console: Console) -> None:
    """Print sizes, times and loss by codec and level, then the answers beside the untouched ones."""
    untouched, *rows = result.rows
    prefill = result.summary["prefill_s"] or 0.0
    questions, answers = untouched["questions"], untouched["answers"]
    console.print(
        f"\n[bold]{result.config['model']}[/] read {result.config['tokens']} tokens in [bold]{prefill:.2f} s[/]. "
        f"Its cache takes {untouched['bytes'] / 1e6:.1f} MB in bf16, 16 bits a number.\n"
        "Encoded, stored, read back and decoded ([bold]*[/]: the codec's default level):"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("codec", "level", "MB", "ratio", "bits", "encode s", "load s", "KL", "same"):
        table.add_column(name, justify="left" if name == "codec" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["codec"],
            f"{row['level']}{'*' if row['default'] else ' '}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['ratio']:.1f}x",
            f"{row['bits_per_element']:.2f}",
            f"{row['encode_s']:.2f}",
            f"{row['load_s']:.2f}",
            f"{row['kl']:.4f}",
            f"{row['same_answers']}/{len(questions)}",
            style="bold" if row["default"] else "",
        )
    console.print(table)
    console.print(
        "load s: fetch and decode into a new cache, instead of reading the text again. bits: of each number in the "
        "cache, all bytes counted. KL: of next-token distributions on the questions and untouched answers, in nats. "
        "same: answers equal to the untouched ones.\n",
        style="dim",
    )
    spoken = Table(title="The answers", title_justify="left", box=SIMPLE_HEAD, pad_edge=False, show_lines=True)
    spoken.add_column("from")
    for question in questions:
        spoken.add_column(Text(question))
    spoken.add_row("untouched", *map(Text, answers), style="bold")
    for row in rows:
        cells = [
            Text("the same", style="green") if answer == before else Text(answer, style="yellow")
            for answer, before in zip(row["answers"], answers, strict=True)
        ]
        spoken.add_row(f"{row['codec']} {row['level']}", *cells)
    console.print(spoken)


def command(app: typer.Typer) -> None:
    """Add the verb `demo`."""

    @app.command()
    def demo(
        context: typer.Context,
        codecs: Annotated[str, typer.Option("--codecs", help="Codecs, by commas.")] = ",".join(CODECS),
        text_file: Annotated[Path | None, typer.Option("--text-file", help="Read this text instead.")] = None,
        question: Annotated[
            list[str] | None, typer.Option("--question", help="Ask this (repeatable), e.g. about your own text.")
        ] = None,
        store: Annotated[
            str | None, typer.Option("--store", help="A store's URL, e.g. file:PATH. Default: a temporary folder.")
        ] = None,
        seed: Seed = 0,
        format: Format = OutputFormat.TERMINAL,
        output: Output = None,
        config: ConfigFile = None,
        export_config: ExportConfig = None,
        quiet: Quiet = False,
    ) -> None:
        """A real model answers from a cache that was encoded, stored, read back and decoded.

        SmolLM2-135M-Instruct reads a handbook of 1,500 tokens; each codec stores its cache at a coarse, its default
        and a fine level; the answers from what comes back are shown beside the untouched ones. The first run
        calibrates the paper's codec for the model (a minute) and keeps the profile.

            cachegen-bench demo

            cachegen-bench demo --codecs channel --text-file notes.txt --question "Who wrote this?"
        """
        export(context, export_config)
        names = [name.strip() for name in codecs.split(",") if name.strip()]
        if text_file is not None and not question:
            raise InputError("--text-file: expected --question along with it; the built-in ones are about the handbook")
        result = run(
            names, text_file, tuple(question or QUESTIONS), store, seed, config=options_in_force(context), quiet=quiet
        )
        finish(result, format, output, lambda console: show(result, console), quiet)
