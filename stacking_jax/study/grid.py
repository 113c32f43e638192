"""The cells of a study: what each run is, in the order in which they are carried out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.study.config import Arm, StudyConfig

Configure = Callable[[Sequence[str], Sequence[str]], Any]
"""From .gin files and bindings to the `TrainConfig` that they describe."""

MANIFEST = "study.json"
CLOSEST = 0.02
"""Share by which the FLOPs of an arm may miss those that it is to have."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: an arm with a seed.

    Attributes:
      arm: its name.
      seed: of the run.
      folder: of the run, below the study's.
      arguments: of `stacking-jax train`, but for --run_dir.
    """

    arm: str
    seed: int
    folder: str
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Budget:
    """What an arm costs: updates and model FLOPs of the whole run, padding included."""

    steps: int
    model_flops: float
    model_flops_per_step: float


@dataclasses.dataclass(frozen=True)
class Grid:
    """Arms with their budgets, and all cells, seed by seed: cut short, it has whole seeds."""

    config: StudyConfig
    budgets: dict[str, Budget]
    cells: tuple[Cell, ...]

    @classmethod
    def of(cls, config: StudyConfig, configure: Configure) -> Grid:
        """Reads the configuration of every arm, so that a mistake shows before the first run.

        Raises:
          UserError: an arm's files or bindings do not make a run (its name stands before),
            or there is no number of steps with the FLOPs that an arm is to have.
        """
        arms = config.all_arms()
        budgets: dict[str, Budget] = {}
        waiting = list(arms)
        while waiting:
            ready = [a for a in waiting if a.flops_of is None or a.flops_of in budgets]
            if not ready:
                circle = ", ".join(arm.name for arm in waiting)
                raise UserError(f"these arms have the FLOPs of one another: {circle}")
            for arm in ready:
                budgets[arm.name] = _budget(config, arm, budgets.get(arm.flops_of), configure)
                waiting.remove(arm)
        cells = tuple(
            _cell(config, arm, budgets[arm.name].steps, seed)
            for seed in config.seeds
            for arm in arms
        )
        return cls(config, {arm.name: budgets[arm.name] for arm in arms}, cells)

    def to_dict(self) -> dict[str, Any]:
        """The manifest: the study, what each arm costs, and what each cell is."""
        return {
            "study": self.config.to_dict(),
            "arms": {name: dataclasses.asdict(of) for name, of in self.budgets.items()},
            "cells": [dataclasses.asdict(cell) for cell in self.cells],
        }


def files_of(config: StudyConfig, arm: Arm) -> list[str]:
    return [*config.experiment, *arm.gin]


def equal_flops_steps(run: Any, target: float) -> int:
    """The steps of a run whose own, fully decayed schedule costs `target` model FLOPs.

    Args:
      run: a `TrainConfig`; of its plan the number of steps is changed, all else is kept.
      target: model FLOPs of the whole run.

    Raises:
      UserError: no number of steps comes within 2 % of it.
    """

    def flops(steps: int) -> float:
        plan = dataclasses.replace(run, total_steps=steps).describe_plan()
        return plan["model_flops"]

    guess = max(1, round(run.total_steps * target / flops(run.total_steps)))
    # A plan of several stages rounds its boundaries: look around the proportional answer.
    tried: dict[int, float] = {}
    for steps in range(max(1, guess - 8), guess + 9):
        try:
            tried[steps] = abs(flops(steps) - target)
        except UserError:  # too few steps for its stages
            continue
    best = min(tried, key=lambda steps: (tried[steps], steps), default=None)
    if best is None or tried[best] > CLOSEST * target:
        raise UserError(
            f"no number of steps costs {target:.3g} FLOPs within {100 * CLOSEST:g} %; the nearest "
            + (f"tried was {best}" if best is not None else "leaves a stage empty")
        )
    return best


def _budget(
    config: StudyConfig, arm: Arm, reference: Budget | None, configure: Configure
) -> Budget:
    try:
        run = configure(files_of(config, arm), [*config.bindings, *arm.bindings])
        steps = run.total_steps
        if reference is not None:
            steps = equal_flops_steps(run, reference.model_flops)
            run = dataclasses.replace(run, total_steps=steps)
        flops = run.describe_plan()["model_flops"]
    except UserError as error:
        raise UserError(f"the arm {arm.name!r}: {error}") from error
    return Budget(steps, flops, flops / steps)


def _cell(config: StudyConfig, arm: Arm, steps: int, seed: int) -> Cell:
    bindings = [*config.bindings, *arm.bindings]
    if arm.flops_of is not None:
        bindings.append(f"TRAIN_STEPS={steps}")
    bindings += [f"SEED={seed}", f"TrainConfig.name={f'{arm.name}, seed {seed}'!r}"]
    if config.tasks:
        bindings.append(f"TrainConfig.evaluate_tasks={list(config.tasks)!r}")
    words: list[str] = []
    for name in files_of(config, arm):
        words += ["--gin_file", name]
    for name in config.imports:
        words += ["--gin_import", name]
    words += [f"--gin.{binding}" for binding in bindings]
    return Cell(arm.name, seed, f"cells/{arm.folder}/seed-{seed}", tuple(words))


def read_manifest(study: Path) -> dict[str, Any]:
    """What `Grid.to_dict` wrote.

    Raises:
      UserError: the folder holds no study, or the file is broken.
    """
    path = study / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        StudyConfig(**found["study"])
        assert isinstance(found["arms"], dict) and isinstance(found["cells"], list)
    except FileNotFoundError:
        raise UserError(
            f"{study} holds no study ({MANIFEST}); name its configuration with --gin_file"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it or begin elsewhere") from None
    return found


def check_same_cells(study: Path, grid: Grid) -> None:
    """Refuses a study whose cells lie here already as other runs; new cells are welcome.

    Raises:
      UserError: a cell would be run with other arguments than it was begun with.
    """
    if not (study / MANIFEST).exists():
        return
    before = {cell["folder"]: cell["arguments"] for cell in read_manifest(study)["cells"]}
    for cell in grid.cells:
        old = before.get(cell.folder, list(cell.arguments))
        if old != list(cell.arguments) and (study / cell.folder).exists():
            changed = [word for word in cell.arguments if word not in old]
            gone = [word for word in old if word not in cell.arguments]
            raise UserError(
                f"{study}: the cell {cell.name} was begun otherwise "
                f"({' '.join(gone) or '-'} became {' '.join(changed) or '-'}); take another "
                "--run_dir"
            )
