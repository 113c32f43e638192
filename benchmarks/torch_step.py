"""A train step in torch, driven from outside; the process holds no JAX.

    python -m benchmarks.torch_step FOLDER    # written by contenders.Torch

`gpt` is written in the manner of nanoGPT (github.com/karpathy/nanoGPT): one module, fused QKV,
`scaled_dot_product_attention`, autocast to bfloat16 over float32 weights, fused AdamW with
decay on matrices alone, clipping at 1, `torch.compile`, TF32 for what stays in float32. Against
GPT-2 it has our decoder's mathematics, so that both compute the same losses: RMSNorm and not
LayerNorm, rotary and not learnt positions, a gated MLP of three matrices of two thirds the
width (gate and up fused), no biases, no dropout. As in nanoGPT, autocast leaves the residual
stream in float32, where ours is in bfloat16.

`llama` is `transformers.LlamaForCausalLM` with SDPA under the same autocast and optimiser.

Speaks JSON, a line each: first what the first steps computed, then, for every number of steps
on the standard input, the seconds that they took.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x, cosines, sines):
        batch, length, width = x.shape
        parts = self.qkv(self.attention_norm(x)).split(width, dim=-1)
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts
        )
        query, key = rotate(query, cosines, sines), rotate(key, cosines, sines)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class GPT(nn.Module):
    def __init__(self, shape: dict):
        super().__init__()
        width, heads, length = shape["width"], shape["heads"], shape["length"]
        self.embedding = nn.Embedding(shape["vocab"], width)
        self.layers = nn.ModuleList(
            Layer(width, shape["inner"], heads) for _ in range(shape["layers"])
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        half = width // heads // 2
        angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, inputs, targets):
        x = self.embedding(inputs)
        for layer in self.layers:
            x = layer(x, self.cosines, self.sines)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    def load(self, tensors: dict) -> None:
        """Takes weights under the names of `LlamaForCausalLM`."""
        state = {
            "embedding.weight": tensors["model.embed_tokens.weight"],
            "norm.weight": tensors["model.norm.weight"],
        }
        fused = {
            "attention_norm": ("input_layernorm",), "mlp_norm": ("post_attention_layernorm",),
            "qkv": tuple(f"self_attn.{name}_proj" for name in "qkv"),
            "out": ("self_attn.o_proj",), "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
            "down": ("mlp.down_proj",),
        }
        for number in range(len(self.layers)):
            for name, parts in fused.items():
                state[f"layers.{number}.{name}.weight"] = torch.cat(
                    [tensors[f"model.layers.{number}.{part}.weight"] for part in parts]
                )
        self.load_state_dict(state)


def rotate(x, cosines, sines):
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat(
        [first * cosines - second * sines, second * cosines + first * sines], dim=-1
    ).to(x.dtype)


class Llama(nn.Module):
    def __init__(self, shape: dict):
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        self.inner = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape["vocab"], hidden_size=shape["width"],
                intermediate_size=shape["inner"], num_hidden_layers=shape["layers"],
                num_attention_heads=shape["heads"], max_position_embeddings=shape["length"],
                rms_norm_eps=1e-6, tie_word_embeddings=True, use_cache=False,
                attn_implementation="sdpa",
            )
        )

    def forward(self, inputs, targets):
        logits = self.inner(input_ids=inputs).logits
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))

    def load(self, tensors: dict) -> None:
        found = self.inner.load_state_dict(tensors, strict=False)
        assert found.missing_keys == ["lm_head.weight"] and not found.unexpected_keys, found


class Step:
    """Model, optimiser and batches."""

    def __init__(self, folder: Path, settings: dict):
        shape, self.device = settings["shape"], torch.device(settings["device"])
        if settings["device"] == "cuda":
            torch.set_float32_matmul_precision("high")
        model = {"gpt": GPT, "llama": Llama}[settings["kind"]](shape)
        with np.load(folder / "params.npz", allow_pickle=False) as stored:
            model.load({name: torch.from_numpy(stored[name].copy()) for name in stored})
        model.to(self.device)
        self.parameters = list(model.parameters())
        rate = settings["optimizer"]
        self.clip = rate["clip_norm"]
        matrices = [p for p in self.parameters if p.dim() > 1]
        vectors = [p for p in self.parameters if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": rate["weight_decay"]},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=rate["peak_learning_rate"], betas=(rate["beta1"], rate["beta2"]),
            eps=rate["epsilon"], fused=True,
        )
        self.model = torch.compile(model) if settings["compiled"] else model
        low = shape["dtype"] == "bfloat16"
        self.precision = lambda: (
            torch.autocast(self.device.type, torch.bfloat16) if low else contextlib.nullcontext()
        )
        self.batches = [self._batch(folder / f"tokens_{i}.npy") for i in range(settings["batches"])]
        self.next = 0

    def _batch(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        targets = torch.from_numpy(np.load(path).astype(np.int64))
        inputs = F.pad(targets[:, :-1], (1, 0))
        if self.device.type == "cuda":
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    def __call__(self) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.batches[self.next % len(self.batches)]
        self.next += 1
        inputs, targets = (part.to(self.device, non_blocking=True) for part in batch)
        with self.precision():
            loss = self.model(inputs, targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), norm

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    step = Step(folder, settings)
    first = [step() for _ in range(settings["checked_steps"])]
    versions = {"torch": torch.__version__}
    if settings["kind"] == "llama":
        import transformers

        versions["transformers"] = transformers.__version__
    name = torch.cuda.get_device_name() if settings["device"] == "cuda" else "cpu"
    say({
        "loss": [float(loss) for loss, _ in first],
        "grad_norm": [float(norm) for _, norm in first],
        "versions": versions, "device": name,
    })
    for line in sys.stdin:
        step.wait()
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        step.wait()
        say({"seconds": time.perf_counter() - began})


def say(answer: dict) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
