"""Fill README's table of figures from the documents beside this file.

python docs/results/render.py            # rewrite README.md
python docs/results/render.py --check    # exit 1 if it would change
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"
SECTION = re.compile(r"(<!-- results:begin -->\n).*?(<!-- results:end -->)", re.DOTALL)

# What README shows: pattern of a summary's name, what it says, how the number is written, the target (or "").
FIGURES: list[tuple[str, str, str, str]] = [
    (r"rans_decode_over_torchac\.(\w+)", "rANS decode over torchac -O3, {0}", "{:.0f} x", ""),
    (r"rans_encode_over_torchac\.(\w+)", "rANS encode over torchac -O3, {0}", "{:.0f} x", ""),
    (r"rans_decode_over_store_bandwidth\.(\w+)", "rANS decode to bf16 over plain stores, {0}", "{:.2f}", ""),
    (r"coder_overhead", "coder overhead, bits per symbol", "{:.4f}", "<= 0.02"),
    (r"lossless_ratio", "`lossless`, bytes of bf16 caches over raw", "{:.3f}", "<= 0.68"),
    (r"lossless_decode_gbps\.(\w+)", "`lossless` decode, GB/s a core, {0}", "{:.2f}", ""),
    (r"decode_peak_over_limit", "peak memory of decode over its limit", "{:.2f}", "<= 1"),
    (r"import_seconds", "`import cachegen` beyond torch, s", "{:.3f}", "< 0.3"),
    (r"cachegen_over_public_at_equal_kl", "`cachegen` bytes over `cachegen_public` at equal KL", "{:.3f}", "<= 0.714"),
    (r"bits_at_kl_0\.01\.(.+)", "bits per element at KL 0.01, `{0}`", "{:.2f}", ""),
]
TARGETS = {
    "rans_decode_over_torchac.avx512": ">= 70",
    "rans_decode_over_torchac.avx2": ">= 40",
    "rans_encode_over_torchac.avx512": ">= 20",
    "rans_encode_over_torchac.avx2": ">= 10",
    "rans_decode_over_store_bandwidth.avx512": ">= 0.5",
    "rans_decode_over_store_bandwidth.avx2": ">= 0.3",
    "lossless_decode_gbps.avx512": ">= 2",
    "lossless_decode_gbps.avx2": ">= 1",
}


def table(documents: dict[str, dict[str, Any]]) -> str:
    """Markdown of the figures found in documents, by file name."""
    lines = ["| what | figure | target | from |", "|---|---|---|---|"]
    for pattern, label, form, target in FIGURES:
        for file, document in documents.items():
            for name, value in document["summary"].items():
                match = re.fullmatch(pattern, name)
                if match:
                    figure = "not bracketed" if value is None else form.format(value)
                    goal = TARGETS.get(name, target)
                    what = label.format(*match.groups())
                    lines.append(f"| {what} | {figure} | {goal} | [{file}](docs/results/{file}) |")
    for file, document in documents.items():
        host = document["host"]
        lines += ["", f"{file}: {host['cpu']}, {host['cores']} cores, {host['isa']}, revision {document['git']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Rewrite README, or with --check only compare."""
    documents = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.json"))}
    before = README.read_text(encoding="utf-8")
    filled = table(documents) if documents else ""
    after = SECTION.sub(lambda found: found[1] + filled + found[2], before)
    if "--check" in sys.argv[1:]:
        if after != before:
            sys.exit("README.md: the figures aren't those of docs/results: run docs/results/render.py")
        return
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
