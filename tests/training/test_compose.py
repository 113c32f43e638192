"""Which methods go together: every pair has its line, the docs have them all, refusals a reason."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from stacking_jax.data import DataConfig
from stacking_jax.errors import UserError
from stacking_jax.models import DecoderConfig
from stacking_jax.training import GrowthConfig, OptimizerConfig, TrainConfig, compose, run_directory
from stacking_jax.training.choice_config import ChoiceConfig
from stacking_jax.training.distill_config import DistillConfig
from stacking_jax.training.loop_config import LoopConfig
from stacking_jax.training.path_config import PathConfig
from stacking_jax.training.similarity_config import SimilarityConfig

PAGE = Path(__file__).resolve().parents[2] / "docs/methods.md"
PLAIN = TrainConfig(
    model=DecoderConfig(vocab_size=64, num_layers=8, d_model=16, d_ff=24, num_heads=2),
    data=DataConfig(), total_steps=40,
)
# What switches each method on.
WITH = {
    "growth": {"growth": GrowthConfig(operator="midas", num_stages=4)},
    "raptr": {"paths": PathConfig("raptr")},
    "layer_drop": {"paths": PathConfig("layer_drop")},
    "depth_rates": {"optimizer": OptimizerConfig(depth_rates=[1.0, 0.5])},
    "loops": {"loops": LoopConfig(loops=2, tie_at=0.75)},
    "similarity": {"similarity": SimilarityConfig(weight=1.0, block=2)},
    "salt": {"distill": DistillConfig(fraction=0.2)},
    "choice": {"choice": ChoiceConfig(candidates=["midas", "lidas"])},
}
NEEDS = {"choice": ["growth"]}


def having(*names):
    return dataclasses.replace(PLAIN, **{
        field: value for name in names for field, value in WITH[name].items()
    })


def test_every_pair_of_methods_has_one_line():
    assert set(compose.PAIRS) == set(itertools.combinations(compose.METHODS, 2))
    assert all(pair.reason for pair in compose.PAIRS.values())
    assert set(WITH) == set(compose.METHODS), "tell this test how to switch the method on"


def test_the_docs_have_the_table():
    assert "\n".join(compose.table()) in PAGE.read_text(encoding="utf-8"), (
        "print its lines with stacking_jax.training.compose.table()"
    )


@pytest.mark.parametrize("pair", compose.PAIRS, ids=" and ".join)
def test_pairs_compose_or_are_refused_with_the_reason(pair):
    one, other = (WITH[name] for name in pair)
    if set(one) & set(other):
        return  # One setting, which names one of the two.
    names = {*pair}
    if compose.PAIRS[pair].composes:
        names.update(needed for name in pair for needed in NEEDS.get(name, ()))
    config = having(*names)
    assert set(compose.used(config)) == names
    if compose.PAIRS[pair].composes:
        assert config.plan().total_steps == 40
        return
    with pytest.raises(UserError) as caught:
        config.plan()
    assert compose.PAIRS[pair].reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WITH)
def test_a_method_alone_makes_a_plan_and_has_a_name(name):
    config = having(name, *NEEDS.get(name, ()))
    assert set(compose.used(config)) == {name, *NEEDS.get(name, ())}
    assert config.plan().final_run_depth == 8
    names = {
        "growth": "midas", "depth_rates": "full depth", "loops": "tied, looped",
        "similarity": config.similarity.method, "choice": "lag(midas, lidas)",
    }
    assert config.method == names.get(name, name)


@pytest.mark.parametrize("name", WITH)
def test_a_run_of_it_is_read_back_from_its_directory(name, tmp_path):
    config = having(name, *NEEDS.get(name, ()))
    record = json.dumps({"config": config.to_dict()})
    (tmp_path / "config.json").write_text(record, encoding="utf-8")
    assert run_directory.read_config(tmp_path) == config


def test_nothing_at_all_is_full_depth():
    assert compose.used(PLAIN) == {} and PLAIN.method == "full depth"
    # A plan by hand of one stage grows nothing.
    alone = dataclasses.replace(PLAIN, growth=GrowthConfig(stages=[(8, 40)]))
    assert compose.used(alone) == {}
