"""Results by content: what is another question, what is the same, and who may read them."""

from __future__ import annotations

import dataclasses
import stat

import pytest

from stacking_jax.planning.cache import ResultCache, program_digest, question
from stacking_jax.planning.topology_plan import full_depth, questions
from stacking_jax.training.config import GrowthConfig, MeshConfig
from stacking_jax.training.distill_config import DistillConfig


def test_what_is_kept_is_found(tmp_path):
    cache = ResultCache(tmp_path / "planned")
    assert cache.find("q") is None and cache.program("p") is None and cache.text("p") is None
    cache.keep("q", "p", {"fits": True}, "HloModule x")
    assert cache.find("q") == {"fits": True} == cache.program("p")
    assert cache.text("p") == "HloModule x"
    cache.keep("other", "p")
    assert cache.find("other") == {"fits": True}


def test_the_folder_is_private(tmp_path):
    cache = ResultCache(tmp_path / "planned")
    cache.keep("q", "p", {"fits": True}, "HloModule x")
    for path in [cache.directory, *cache.directory.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_damaged_result_is_none(tmp_path, content):
    cache = ResultCache(tmp_path)
    cache.keep("q", "p", {"fits": True})
    (tmp_path / "programs" / "p.json").write_text(content)
    assert cache.find("q") is None


def test_plans_with_the_same_depths_ask_the_same(tiny, with_model):
    asked = question(tiny, 1, "v5e:2x2")
    same = [
        dataclasses.replace(tiny, name="other", seed=7, log_every=1, checkpoint_every=3),
        dataclasses.replace(tiny, growth=dataclasses.replace(tiny.growth, alpha=2.0)),
    ]
    assert {question(config, 1, "v5e:2x2") for config in same} == {asked}
    full = dataclasses.replace(tiny, growth=GrowthConfig())
    assert question(full, 0, "v5e:2x2") == asked
    different = [
        question(tiny, 0, "v5e:2x2"), question(tiny, 1, "v5e:4x4"),
        question(with_model(tiny, remat="full"), 1, "v5e:2x2"),
        question(dataclasses.replace(tiny, batch_size=32), 1, "v5e:2x2"),
        question(dataclasses.replace(tiny, mesh=MeshConfig(tensor=2)), 1, "v5e:2x2"),
        question(dataclasses.replace(tiny, total_steps=31), 1, "v5e:2x2"),
    ]
    assert len({asked, *different}) == len(different) + 1


def test_gates_and_climbing_rates_know_where_growths_are(tiny):
    ramped = dataclasses.replace(tiny, growth=dataclasses.replace(tiny.growth, ramp_steps=2))
    later = dataclasses.replace(
        tiny, growth=dataclasses.replace(tiny.growth, ramp_steps=2, alpha=2.0)
    )
    assert len({question(c, 1, "v5e:2x2") for c in (tiny, ramped, later)}) == 3


def test_a_teacher_counts_while_it_is_there(tiny):
    last = len(tiny.plan().stages)
    salted = dataclasses.replace(tiny, distill=DistillConfig(fraction=0.1))
    assert [stage.taught for stage in salted.plan().stages][:2] == [True, False]
    asked = question(salted, last, "v5e:2x2")
    assert asked == question(tiny, last - 1, "v5e:2x2")
    assert asked == question(full_depth(salted), 0, "v5e:2x2")
    assert len(questions(salted)) == len(questions(tiny)) + 1
    others = [
        dataclasses.replace(salted, distill=dataclasses.replace(salted.distill, **change))
        for change in ({}, {"weight": 0.3}, {"teacher_depth": 1.0}, {"top_k": 3})
    ]
    taught = {question(config, 0, "v5e:2x2") for config in others}
    assert len(taught | {question(tiny, 0, "v5e:2x2")}) == 5


def test_a_program_is_known_by_its_text_and_its_topology():
    asked = {
        program_digest("a", "v5e:2x2"), program_digest("b", "v5e:2x2"),
        program_digest("a", "v5p:2x2x1"),
    }
    assert len(asked) == 3 and program_digest("a", "v5e:2x2") in asked
