"""Whole runs with a teacher: what they learn from, cost and save, and that they go on exactly."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.models import LAYOUT
from stacking_jax.training import Stopped, sharding, teacher, train
from stacking_jax.training.distill_config import DistillConfig
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.programs import lower_train_step
from stacking_jax.training.state import abstract_state, model_graph


@pytest.fixture(scope="module")
def salted(config, reference):
    """Five of nine steps by the word of the finished run, through the growth after step 3."""
    return dataclasses.replace(
        config, distill=DistillConfig(fraction=0.5, teacher=str(reference), weight=0.6)
    )


@pytest.fixture(scope="module")
def undisturbed(salted, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("salted") / "run"
    train(salted, run_dir)
    return run_dir


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        train(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_teacher_leaves_at_a_boundary(salted, undisturbed, read_rows, read_summary):
    stages = salted.plan().stages
    assert [(s.depth, s.start, s.steps, s.taught) for s in stages] == [
        (2, 0, 3, True), (4, 3, 1, True), (4, 4, 5, False),
    ]
    assert [stage.grows for stage in stages] == [False, True, False]
    rows = read_rows(undisturbed, "train")
    assert ["soft_loss" in row for row in rows] == [True] * 4 + [False] * 5
    summary = read_summary(undisturbed)
    assert summary["method"] == "midas + salt" and summary["growths"] == [3]
    assert json.loads((undisturbed / "teacher.json").read_text())["step"] == 9


def test_it_teaches_something(undisturbed, reference, read_rows):
    """The same seed and data: the first loss is that of the plain run, the others are not."""
    plain, taught = read_rows(reference, "train"), read_rows(undisturbed, "train")
    assert plain[0]["loss"] == taught[0]["loss"] != taught[0]["soft_loss"]
    assert all(a["loss"] != b["loss"] for a, b in zip(plain[1:], taught[1:], strict=True))
    assert taught[3]["soft_loss"] < taught[0]["soft_loss"]


@pytest.mark.parametrize("stop_at", [2, 4])
def test_it_goes_on_as_if_nothing_had_been(salted, undisturbed, read_summary, tmp_path, stop_at):
    run_dir = tmp_path / "run"
    with pytest.raises(Stopped):
        train(salted, run_dir, stop_at=stop_at)
    train(salted, run_dir)
    assert read_summary(run_dir)["params_digest"] == read_summary(undisturbed)["params_digest"]
