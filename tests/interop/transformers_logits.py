"""Logits by `transformers`, in a process of its own: torch and JAX share no memory.

    python transformers_logits.py TOKENS.npy OUT.npz FOLDER...
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def main(tokens_file: str, out: str, *folders: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokens = torch.from_numpy(np.load(tokens_file))
    results = {}
    for folder in folders:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if report[kind]:
                raise SystemExit(f"{folder}: {kind}: {sorted(report[kind])}")
        with torch.no_grad():
            name = Path(folder).name
            results[name] = model.eval()(tokens).logits.numpy()
        results[f"{name}.class"] = np.array(type(model).__name__)
        results[f"{name}.depth"] = np.array(AutoConfig.from_pretrained(folder).num_hidden_layers)
        if name.startswith("run"):
            ids = AutoTokenizer.from_pretrained(folder)("A byte: é")["input_ids"]
            results[f"{name}.ids"] = np.array(ids)
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
