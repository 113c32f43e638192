"""Run directories made by formula: inputs for what reads, compares and draws runs."""

from __future__ import annotations

import json
import math
import random as random_module
from pathlib import Path

import pytest

COMPARABILITY = {
    "data_digest": "9f2c4be1d7a05538c0ffee00",
    "vocabulary": "bytes",
    "eval_digest": "51b7d0aa93e2c4f6",
    "batch_size": 16,
    "sequence_length": 256,
    "optimizer": "adamw",
    "peak_learning_rate": 0.003,
    "model": "decoder d_model 256, 8 layers, 4 heads, d_ff 704",
    "seed": 0,
}
_BLOCK, _HEAD, _EMBED = 5.2e6, 0.4e6, 66_000


def write_run(
    path: Path,
    name: str = "run",
    depths=(8,),
    steps=(300,),
    until: int | None = None,
    summary: bool = True,
    compare: dict | None = None,
    decayed: bool = True,
    speed: float = 6e11,
    noise: float = 0.05,
    log_every: int = 1,
    overhead: float = 4.0,
    method: str | None = None,
) -> dict:
    """Writes a run directory that looks like one of training; returns its summary.

    Args:
      path: the directory to make.
      depths, steps: of each stage.
      until: the last step that is written; by default all.
      summary: whether the run has ended.
      compare: what differs from COMPARABILITY; None as a value removes the key.
      decayed: whether the learning rate comes down at the end.
      speed: FLOP/s of the imagined machine.
      noise: of the training loss, nats.
      log_every: steps between rows.
      overhead: seconds of compiling per stage.
      method: by default "midas" for several stages, else "full depth".
    """
    path.mkdir(parents=True)
    random = random_module.Random(name)
    total, tokens_per_step = sum(steps), 16 * 256
    until = total if until is None else until
    method = method or ("midas" if len(depths) > 1 else "full depth")
    comparability = {**COMPARABILITY, **(compare or {})}
    comparability = {k: v for k, v in comparability.items() if v is not None}

    def flops_per_token(depth):
        return 3 * (_BLOCK * depth + _HEAD)

    full = total * flops_per_token(depths[-1])
    cost = sum(s * flops_per_token(d) for d, s in zip(depths, steps, strict=True))
    stages = [
        {
            "depth": d,
            "steps": s,
            "params": int(_BLOCK / 2 * d + _EMBED),
            "flops_per_token": flops_per_token(d),
            "tokens": s * tokens_per_step,
            "operator": "midas" if i else None,
        }
        for i, (d, s) in enumerate(zip(depths, steps, strict=True))
    ]
    plan = {
        "stages": stages,
        "total_steps": total,
        "speedup_blocks": total * depths[-1] / sum(d * s for d, s in zip(depths, steps)),
        "speedup_model": full / cost,
    }
    rows, measured = [], []
    tokens = flops = train = wall = compiled = 0.0
    step = stage = 0
    wall += 3.0
    for stage, (depth, count) in enumerate(zip(depths, steps, strict=True), start=1):
        if step >= until and stage > 1:
            break
        wall += overhead
        compiled += overhead

        def totals():
            return {
                "tokens": tokens, "model_flops": flops, "wall_seconds": round(wall, 3),
                "train_seconds": round(train, 3),
            }  # fmt: skip

        if stage > 1:
            before = depths[stage - 2]
            block = depth - before
            middle = -(-(before // block) // 2) * block
            grown = [*range(middle), *range(middle - block, before)]
            rows.append(
                {"kind": "grow", "step": step, "from_depth": before, "to_depth": depth,
                 "operator": "midas", "map": grown, "seconds": 0.4,
                 "compile_seconds": overhead, **totals()}
            )  # fmt: skip
        begin = dict(totals())
        for _ in range(count):
            if step >= until:
                break
            step += 1
            seconds = tokens_per_step * flops_per_token(depth) / speed
            seconds *= 1 + 0.04 * math.sin(step * 1.7)
            tokens += tokens_per_step
            flops += tokens_per_step * flops_per_token(depth)
            train += seconds
            wall += seconds * 1.01
            share = step / total
            cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))
            rate = cosine if decayed else 1.0 - share / 4
            rate *= 0.003 * min(1.0, step / 20)
            lag = 0.14 * (1 - depth / depths[-1]) + 0.002 * (step - sum(steps[: stage - 1]) < 4)
            clean = 1.28 + 4.25 * math.exp(-(step**0.62) / 4.2) + 26 / (step + 30) * 0.35
            clean += lag + (0.05 if rate > 0.001 else 0.0) * (rate / 0.003)
            wobble = noise * random.gauss(0.0, 1.0)
            if step % log_every == 0 or step == until:
                rows.append(
                    {"kind": "train", "step": step, "stage": stage, "depth": depth,
                     "loss": clean + wobble, "learning_rate": rate, "grad_norm": 0.8, **totals()}
                )  # fmt: skip
            if step % max(1, total // 12) == 0 or step == until:
                wall += 0.7
                rows.append(
                    {"kind": "eval", "step": step, "stage": stage, "depth": depth,
                     "eval_loss": clean + 0.03, "bits_per_byte": (clean + 0.03) / math.log(2),
                     **totals()}
                )  # fmt: skip
        measured.append(
            {"depth": depth, "steps": count, "tokens": tokens - begin["tokens"],
             "model_flops": flops - begin["model_flops"],
             "seconds": train - begin["train_seconds"], "compile_seconds": overhead}
        )  # fmt: skip
    wall += 1.5
    last_eval = [r for r in rows if r["kind"] == "eval"][-1]
    result = {
        "name": name, "final_step": step, "params_digest": "ab" * 32,
        "train_loss": [r for r in rows if r["kind"] == "train"][-1]["loss"],
        "eval_loss": last_eval["eval_loss"], "bits_per_byte": last_eval["bits_per_byte"],
        "tokens": tokens, "model_flops": flops, "wall_seconds": wall, "train_seconds": train,
        "compile_seconds": compiled, "growths": [r["step"] for r in rows if r["kind"] == "grow"],
        "params": stages[-1]["params"], "depth": depths[-1], "method": method,
        "total_steps": total, "speedup_blocks": plan["speedup_blocks"],
        "speedup_model": plan["speedup_model"], "stages": measured,
        "comparability": comparability, "versions": {"jax": "0.10.2", "flax": "0.12.8"},
    }  # fmt: skip
    config = {
        "name": name,
        "model": {"d_model": 256, "num_layers": depths[-1], "num_heads": 4, "d_ff": 704},
        "growth": {"operator": "midas" if len(depths) > 1 else None, "stages": len(depths),
                   "schedule": "prop2" if len(depths) > 1 else "none"},
        "train": {"steps": total, "batch_size": 16, "seed": comparability.get("seed"),
                  "optimizer": {"name": "adamw", "learning_rate": 0.003, "weight_decay": 0.1}},
        "data": {"task": "python_stdlib", "vocabulary": "bytes", "sequence_length": 256},
        "comparability": comparability,
    }  # fmt: skip
    (path / "plan.json").write_text(json.dumps(plan))
    (path / "config.json").write_text(json.dumps(config))
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary:
        (path / "summary.json").write_text(json.dumps(result))
    return result


@pytest.fixture
def make_run(tmp_path):
    """make_run("a", ...) writes tmp_path/a and returns its path."""

    def make(directory: str = "run", **options) -> Path:
        options.setdefault("name", directory)
        write_run(tmp_path / directory, **options)
        return tmp_path / directory

    return make


MIDAS = {"depths": (2, 4, 6, 8), "steps": (10, 40, 90, 160)}


@pytest.fixture
def demo_runs(make_run):
    """The three runs of the demo: MIDAS, full depth for as many steps, and for as many FLOPs."""
    return [
        make_run("midas", name="MIDAS PROP-2", **MIDAS),
        make_run("full_steps", name="full depth, equal steps", steps=(300,)),
        make_run("full_flops", name="full depth, equal FLOPs", steps=(251,)),
    ]
