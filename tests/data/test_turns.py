"""A mixture whose rates change on the way, and growth that meets the change."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stacking_jax.data import DataConfig, PackedBatches, open_cache
from stacking_jax.data.mixture import interleave
from stacking_jax.data.turns import Turns
from stacking_jax.errors import UserError


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.lists(st.integers(0, 9), min_size=3, max_size=3)),
        min_size=1, max_size=4,
    ).filter(lambda parts: all(sum(rates) for _, rates in parts))
)
def test_each_source_is_read_in_order_without_gaps_over_all_parts(parts):
    begins = np.cumsum([0, *(length for length, _ in parts)])[:-1]
    turns = Turns([(int(at), rates) for at, (_, rates) in zip(begins, parts, strict=True)])
    seen = collections.Counter()
    for place in range(200):
        assert turns.counts(place) == [seen[0], seen[1], seen[2]]
        source, position = turns.at(place)
        part = int(np.searchsorted(begins, place, side="right")) - 1
        assert position == seen[source] and parts[part][1][source] > 0
        seen[source] += 1


@given(st.lists(st.integers(1, 90), min_size=1, max_size=6), st.integers(0, 10**12))
def test_without_a_change_it_is_the_plain_mixture(rates, place):
    assert Turns([(0, rates)]).at(place) == interleave(place, rates)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    place = tmp_path_factory.mktemp("stages")
    for name in ("web", "math"):
        (place / name).mkdir()
        for i in range(40):
            (place / name / f"{i}.txt").write_text(f"{name[0]}{i} " * 60)
    return DataConfig(
        text_dir=str(place), sequence_length=64, held_out=0.1, mixture={"web": 3, "math": 1},
    )


def test_a_cool_down_reads_what_it_says_from_its_step_on(config):
    staged = dataclasses.replace(
        config, mixture={"web": 1, "math": 0}, stages=[(0.75, {"web": 1, "math": 3})]
    )
    cache = open_cache(staged)
    batches = PackedBatches(cache, batch_size=4, seed=0, total_steps=20)
    sources = [[batches.source_of(step, row) for row in range(4)] for step in range(20)]
    assert all(row == ["web"] * 4 for row in sources[:15])
    assert all(sorted(row) == ["math"] * 3 + ["web"] for row in sources[15:])
    again = PackedBatches(cache, batch_size=4, seed=0, total_steps=20)
    for step in (19, 3, 15):
        found = again.batch(step)
        assert np.array_equal(found["tokens"], batches.batch(step)["tokens"])
        part = again.batch(step, rows=[1, 3])
        assert np.array_equal(part["tokens"], found["tokens"][[1, 3]])
    passes = batches.passes(20)
    assert passes["math"] == pytest.approx(15 / cache.sources["math"].num_records("train"))
    with pytest.raises(ValueError, match="total_steps"):
        PackedBatches(cache, batch_size=4)


def test_stages_make_no_cache_anew_and_are_part_of_the_digest(config):
    staged = dataclasses.replace(config, stages=[(0.5, {"math": 1})])
    plain, later = open_cache(config), open_cache(staged)
    assert later.manifest.digest != plain.manifest.digest
    for name in ("web", "math"):
        assert later.sources[name].manifest.digest == plain.sources[name].manifest.digest
    unlike = dataclasses.replace(config, stages=[(0.6, {"math": 1})])
    assert open_cache(unlike).manifest.digest != later.manifest.digest


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stages": []}, "must be a list"),
        ({"stages": [0.5]}, "has the entry"),
        ({"stages": [(0.5, {"code": 1})]}, "not in the mixture"),
        ({"stages": [(0.5, {"math": 1}), (0.5, {"web": 1})]}, "rise between 0 and 1"),
        ({"stages": [(1.0, {"math": 1})]}, "rise between 0 and 1"),
        ({"stages": [(0.5, {"math": 0})]}, "rates numbers above 0"),
        ({"mixture": None, "stages": [(0.5, {"math": 1})]}, "of a mixture"),
        ({"mixture": {"web": 0}, "stages": [(0.5, {"web": 1})]}, "some source needs"),
    ],
)
def test_stages_that_are_none_are_refused(config, settings, said):
    with pytest.raises(UserError, match=said) as caught:
        dataclasses.replace(config, **settings)
    assert "\n" not in str(caught.value)


def test_stages_need_steps_of_their_own(config):
    staged = dataclasses.replace(config, stages=[(0.5, {"math": 1}), (0.55, {"web": 1})])
    assert [step for step, _ in staged.stages_of(20)] == [10, 11]
    with pytest.raises(UserError, match="each needs a step"):
        staged.stages_of(8)
