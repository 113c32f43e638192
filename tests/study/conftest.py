"""Studies made by formula: folders that look like ones that were run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from stacking_jax.study.config import StudyConfig
from stacking_jax.study.grid import MANIFEST, Budget, Grid, _cell

COMPARABILITY = {
    "data_digest": "9f2c", "vocabulary": "bytes", "eval_digest": "51b7", "batch_size": 16,
    "sequence_length": 256, "optimizer": "adamw", "peak_learning_rate": 0.003,
    "model": "8 layers",
}
TASKS = ("primitive/a", "primitive/b")


def write_cell(
    folder: Path, name: str, seed: int, depths, steps, loss: float, score: float,
    compare: dict | None = None, slow: float = 1.0, grows: bool = True,
    teacher: bool = False, tried: float = 0.0,
) -> None:
    """A run directory that ends with this held-out loss and score.

    A step takes 10 ms per layer, and every tenth one ten times as long, as on a disturbed
    machine; `slow` multiplies all of it. A boundary stalls for a second: a growth, which says so
    itself, or another one, of which there is only an account.

    Args:
      grows: whether anything grows at the boundaries.
      teacher: whether it trained one first, of 2 layers, for 100 steps.
      tried: training steps in which candidates were tried out at each boundary.
    """
    folder.mkdir(parents=True)
    total = sum(steps)
    rows, done, tokens, flops, seconds = [], 0, 0, 0.0, 0.0
    stages = []
    for stage, (depth, count) in enumerate(zip(depths, steps, strict=True), start=1):
        stages.append({"depth": depth, "steps": count, "start": done, "tokens": 4096 * count,
                       "operator": "midas" if stage > 1 else None})
        if stage > 1 and not grows:
            rows.append({"kind": "boundary", "step": done, "start": done, "stage": stage,
                         "depth": depth, "stall_seconds": 1.0, "stall_steps": 10.0,
                         "step_seconds": 0.1, "seconds": {}, "spans": [], "steps": []})
        if stage > 1 and grows:
            rows.append({"kind": "grow", "step": done, "from_depth": depths[stage - 2],
                         "to_depth": depth, "map": [0] * depth, "seconds": 1.0,
                         "compile_seconds": 0.0, "tokens": tokens, "model_flops": flops,
                         "train_seconds": seconds, "wall_seconds": seconds})
        for _ in range(count):
            done += 1
            tokens += 4096
            flops += 1e9 * depth
            seconds += slow * 0.01 * depth * (10 if done % 10 == 5 else 1)
            common = {"step": done, "stage": stage, "tokens": tokens, "model_flops": flops,
                      "train_seconds": seconds, "wall_seconds": seconds}
            now = loss + math.exp(-4 * done / total) - math.exp(-4)
            rows.append({"kind": "train", "loss": now + 0.01,
                         "learning_rate": 0.003 * (1 - 0.9 * done / total), **common})
            if done % 10 == 0 or done == total:
                rows.append({"kind": "eval", "eval_loss": now, "bits_per_byte": now, **common})
    rows += [
        {"kind": "task_eval", "step": total, "task": task, "group": "primitives",
         "metric": "exact_match", "value": score + shift, "interval": [score, score],
         "chance": 4.0, "n": 100}
        for task, shift in zip(TASKS, (-2.0, 2.0), strict=True)
    ]
    comparability = {**COMPARABILITY, "seed": seed, **(compare or {})}
    about = {"name": name, "method": name, "comparability": comparability}
    summary = about | {
        "final_step": total, "total_steps": total, "eval_loss": loss, "train_loss": loss,
        "bits_per_byte": loss, "tokens": tokens, "model_flops": flops, "wall_seconds": seconds,
        "train_seconds": seconds, "compile_seconds": 1.0, "depth": depths[-1], "params": 1e6,
        "stages": [stage | {"seconds": 1.0} for stage in stages],
        "versions": {"jax": "0.10.2"},
    }
    plan = {"stages": stages, "total_steps": total}
    if teacher:
        plan["teacher"] = {"trained_within_the_run": True}
        write_cell(folder / "teacher", "teacher", seed, (2,), (100,), loss, score, slow=slow)
    if tried:
        (folder / "decisions.jsonl").write_text("".join(
            json.dumps({"kind": "choice", "stage": number, "step": stage["start"],
                        "cost": {"steps": tried, "seconds": 1e4, "flops": 0.0}}) + "\n"
            for number, stage in enumerate(stages) if number
        ))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary))


SHAPES = {
    "full depth": ((8,), (100,)),
    "full depth, equal FLOPs": ((8,), (75,)),
    "midas": ((4, 8), (50, 50)),
}
LOSSES = {"full depth": 2.0, "full depth, equal FLOPs": 2.2, "midas": 2.1}
CONFIG = {
    "name": "made up",
    "arms": {"full depth": {}, "full depth, equal FLOPs": {"flops_of": "midas"}, "midas": {}},
    "seeds": [0, 1, 2, 3],
    "tasks": list(TASKS),
    "endpoints": ["loss", "score"],
    "comparisons": [["midas", "full depth"], ["midas", "full depth, equal FLOPs"]],
}


@pytest.fixture
def make_study(tmp_path):
    """make_study(swing=..., score=..., leave=..., compare=..., **config) -> folder

    `swing` moves midas up with even seeds and down with odd ones; `midas` is passed to
    `write_cell` for its cells, by seed.
    """

    def make(
        swing=0.0, score=60.0, leave=(), compare=None, slow=None, folder="study", midas=None,
        **config,
    ):
        study = tmp_path / folder
        settings = StudyConfig(**{**CONFIG, **config})
        arms = settings.all_arms()
        budgets = {}
        for arm in arms:
            depths, steps = SHAPES[arm.name]
            flops = sum(1e9 * d * n for d, n in zip(depths, steps, strict=True))
            budgets[arm.name] = Budget(sum(steps), flops, flops / sum(steps))
        cells = tuple(
            _cell(settings, arm, budgets[arm.name].steps, seed)
            for seed in settings.seeds for arm in arms
        )
        study.mkdir()
        (study / MANIFEST).write_text(json.dumps(Grid(settings, budgets, cells).to_dict()))
        for cell in cells:
            if (cell.arm, cell.seed) in leave:
                continue
            shared = 0.1 * random.Random(cell.seed).gauss(0, 1)
            own = 0.001 * random.Random(f"{cell.arm} {cell.seed}").gauss(0, 1)
            own += swing * (-1) ** cell.seed * (cell.arm == "midas")
            about = {"shape": SHAPES[cell.arm]}
            if midas is not None and cell.arm == "midas":
                about |= midas(cell.seed)
            write_cell(
                study / cell.folder, cell.name, cell.seed, *about.pop("shape"),
                loss=LOSSES[cell.arm] + shared + own, score=score + own,
                compare=(compare or {}).get((cell.arm, cell.seed)),
                slow=(slow or {}).get(cell.seed, 1.0), **about,
            )
        return study

    return make
