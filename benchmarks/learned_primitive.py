"""A demo-size model learns variable assignment, and the command that scores it says so.

    python -m benchmarks.learned_primitive --out benchmarks/results/learned_primitive.json

Scorers are held against an oracle and against shuffled answers by tests. This is the third
proof: a model that has really learned a task must be given the score. Everything goes through
the commands that a user has: `vocab`, `train` and `evaluate`.

A model of this size learns to look something up only where much of what it reads can be
looked up. So the texts, all from the training half of the problems, are of three kinds:
random strings that come three times (copying), programs whose lines are repeated in random
order, and programs with many questions. Prompts carry no loss. A name and its sign, "x=",
are one token, so that what was asked stands right before the answer. The model starts with
two layers and grows to the eight of the demo by MIDAS with identity starts.
"""

from __future__ import annotations

import argparse
import json
import os
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import machine
from stacking_jax.data import primitives

HEADER = "Fill in blank:\n\n"
QUESTION = "=___. ->"
RATES = {"copying": 20, "repeated": 50, "asked": 30}
"""Kind of text -> its share of what is read."""
TASK = "variable_assignment/basic/depth_0/0_shot"


def copying(rng: np.random.Generator) -> tuple[str, str]:
    """A random string, and twice more."""
    letters = list(string.ascii_lowercase + string.digits)
    once = "".join(letters[i] for i in rng.integers(len(letters), size=rng.integers(16, 25)))
    return f"{once}|", f"{once}|{once}"


def repeated(rng: np.random.Generator, lines: list[str], count: int) -> tuple[str, str]:
    """A program, and its lines again in random order."""
    again = [lines[i] for i in rng.integers(len(lines), size=count)]
    return HEADER + "\n".join(lines) + "\n", "\n".join(again)


def asked(rng: np.random.Generator, lines: list[str], count: int) -> tuple[str, str]:
    """A program, and questions about it as the task asks them."""
    asked_of = [lines[i].partition("=") for i in rng.integers(len(lines), size=count)]
    first, *others = [(name + QUESTION, value) for name, _, value in asked_of]
    prompt = HEADER + "\n".join([*lines, first[0]])
    return prompt, "\n".join([first[1], *(question + value for question, value in others)])


def write_texts(folder: Path, documents: int, seed: int) -> None:
    """Three JSONL files, a document a line."""
    rng = np.random.default_rng(seed)
    task = primitives.find(TASK.removesuffix("/0_shot"))
    problems = primitives.examples(task, "train", 2 * documents, seed=seed)
    programs = [problem.prompt.removeprefix(HEADER).splitlines()[:-1] for problem in problems]
    texts = {
        "copying": [copying(rng) for _ in range(documents // 2)],
        "repeated": [repeated(rng, lines, 20) for lines in programs[:documents]],
        "asked": [
            asked(rng, lines, int(rng.choice([1, 4, 16]))) for lines in programs[documents:]
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in texts.items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"inputs": given, "targets": wanted, "text": given + wanted}) + "\n"
                for given, wanted in rows
            )


def run(*words: str | Path) -> str:
    """A command of stacking-jax; what it printed."""
    command = [sys.executable, "-m", "stacking_jax", *map(str, words)]
    print("$ stacking-jax", *words[:1], flush=True)
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/learned_primitive"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=3200)
    parser.add_argument("--documents", type=int, default=30_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    texts, model, folder = (arguments.work / name for name in ("texts", "vocab.model", "run"))
    if not texts.exists():
        write_texts(texts, arguments.documents, arguments.seed)
    bindings = {
        "DataConfig.held_out": 0.01,
        "TRAIN_STEPS": arguments.steps,
        "BATCH_SIZE": 16,
        "LEARNING_RATE": 0.004,
        "OptimizerConfig.name": "'muon'",
        "OptimizerConfig.schedule": "'wsd'",
        "OptimizerConfig.weight_decay": 0.0,
        # In steps, however long the run: after 11 instead of 40, looking up was not learned.
        "OptimizerConfig.warmup_fraction": min(40 / arguments.steps, 1.0),
        "GrowthConfig.stage_fractions": [0.85, 0.05, 0.05, 0.05],
        "GrowthConfig.init": "'identity'",
        "DecoderConfig.vocab_size": 384,
        "TrainConfig.eval_every": 500,
        "TrainConfig.log_every": 20,
        "TrainConfig.checkpoint_every": 500,
        "TrainConfig.keep_checkpoints": 10,
        "TrainConfig.seed": arguments.seed,
    }
    gin = ["--gin_file", "gin/experiments/demo.gin", "--gin_file", "gin/data/text_folder.gin"]
    gin += [f"--gin.{name}={value}" for name, value in bindings.items()]
    began = time.time()
    if not model.exists():
        symbols = [f"{letter}=" for letter in string.ascii_lowercase] + ["___. ->"]
        run("vocab", *gin, f"--gin.TEXT_DIR={str(texts)!r}", f"--gin.DataConfig.mixture={RATES}",
            "--out", model, "--vocab_size", "360", "--extra_ids", "0", "--sample", "1MB",
            *(f"--symbol={symbol}" for symbol in symbols))
    os.environ["LEARNED_PRIMITIVE"] = str(arguments.work.absolute())
    tasks = ["--gin_import", "benchmarks.learned_primitive_tasks"]
    learned = {f"learned_{kind}": rate for kind, rate in RATES.items()}
    gin += ["--gin.TEXT_DIR=None", f"--gin.DataConfig.mixture={learned}"]
    run("train", *gin, *tasks, "--run_dir", folder)
    scores = run("evaluate", "--run_dir", folder, *tasks, "--tasks", TASK, "--limit", "1000",
                 "--all_steps", "--json")
    result = {
        "benchmark": "learned_primitive", "machine": machine(), "steps": arguments.steps,
        "seconds": round(time.time() - began), "scores": json.loads(scores),
    }
    print(json.dumps(result["scores"], indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
