"""Prepares the data of the depth reasoning study: texts, their vocabulary, their packed copy.

    python -m benchmarks.depth_reasoning
    stacking-jax study --gin_file gin/studies/depth_reasoning.gin --run_dir runs/reasoning_study

What the study asks and how it decides stands in benchmarks/study.md. Texts are those by which a
small model learns to look things up (see learned_primitive.py): random strings that come three
times, programs of variable assignments whose lines are repeated in random order, and programs
with questions, as the tasks ask them, for each depth from 0 to 3. Prompts carry no loss.
Training and held-out texts are made of problems of the training and the validation half.
"""

from __future__ import annotations

import argparse
import json
import string
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.learned_primitive import HEADER, QUESTION, copying, repeated
from stacking_jax.data import primitives

FOLDER = Path("runs/depth_reasoning")
DEPTHS = (0, 1, 2, 3)
KINDS = ("copying", "repeated", *(f"asked_{depth}" for depth in DEPTHS))
SPLITS = {"train": 1.0, "validation": 0.02}
"""Split -> its documents of each kind, as a share of those asked for."""
EXPERIMENT = "gin/experiments/depth_reasoning.gin"


def asked(rng: np.random.Generator, problem, values: dict[str, str]) -> tuple[str, str]:
    """A program, the question of the problem, and others of its depth, each asked once."""
    first = problem.prompt.removesuffix(QUESTION).splitlines()[-1]
    names = [name for name in values if name != first]
    others = [names[i] for i in rng.permutation(len(names))[: rng.integers(len(names) + 1)]]
    more = "".join(f"\n{name}{QUESTION}{values[name]}" for name in others)
    return problem.prompt, problem.target + more


def lines_of(problem) -> list[str]:
    """The assignments of a problem, in order."""
    return problem.prompt.removeprefix(HEADER).splitlines()[:-1]


def last_values(lines: list[str], count: int = 5) -> dict[str, str]:
    """The variables of the last group of a program, and their numbers."""
    values: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition("=")
        values[name] = values.get(value, value)
    return dict(list(values.items())[-count:])


def texts_of(split: str, count: int, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Kind -> (prompt, what carries loss), `count` of each."""
    rng = np.random.default_rng([seed, split == "train"])
    found = {"copying": [copying(rng) for _ in range(count)], "repeated": []}
    for depth in DEPTHS:
        task = primitives.find(f"variable_assignment/basic/depth_{depth}")
        asked_of = primitives.examples(task, split, count, seed=seed)
        found[f"asked_{depth}"] = [
            asked(rng, problem, last_values(lines_of(problem))) for problem in asked_of
        ]
        programs = primitives.examples(task, split, -(-count // len(DEPTHS)), seed=seed + 1)
        found["repeated"] += [
            repeated(rng, lines, min(20, 2 * len(lines))) for lines in map(lines_of, programs)
        ]
    return found


def write_texts(folder: Path, documents: int, seed: int = 0) -> None:
    """A JSONL file per kind and split: `inputs`, `targets`, and both as `text`."""
    for split, share in SPLITS.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for kind, rows in texts_of(split, max(1, round(share * documents)), seed).items():
            with open(folder / split / f"{kind}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"inputs": given, "targets": wanted, "text": given + wanted}) + "\n"
                    for given, wanted in rows
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=20_000, help="of each kind")
    arguments = parser.parse_args()

    def run(*words: str | Path) -> None:
        subprocess.run([sys.executable, "-m", "stacking_jax", *map(str, words)], check=True)

    texts, model = FOLDER / "texts", FOLDER / "vocab.model"
    if not texts.exists():
        write_texts(texts, arguments.documents)
    if not model.exists():
        symbols = [f"{letter}=" for letter in string.ascii_lowercase] + ["___. ->"]
        run("vocab", "--gin_file", "gin/experiments/demo.gin", "--gin.DataConfig.mixture=None",
            f"--gin.TEXT_DIR={str(texts / 'train')!r}", "--out", model, "--vocab_size", "360",
            "--extra_ids", "0", "--sample", "1MB", *(f"--symbol={symbol}" for symbol in symbols))
    run("cache", "--gin_file", EXPERIMENT, "--gin_import", "benchmarks.depth_reasoning_tasks")


if __name__ == "__main__":
    main()
