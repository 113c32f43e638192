"""What a run says of itself before it begins and after it ends."""

from __future__ import annotations

import json

import pytest

from stacking_jax.data import open_cache
from stacking_jax.training.held_out import HeldOut
from stacking_jax.training.summary import describe


@pytest.fixture
def compared(config, tmp_path):
    """compared(config): what decides whether runs may be compared."""

    def of(some_config=config) -> dict:
        cache = open_cache(some_config.data)
        held_out = HeldOut.open(cache, some_config)
        return describe(some_config, tmp_path / "mine", cache, held_out)["comparability"]

    return of


def test_a_run_is_called_after_its_directory_unless_it_has_a_name(config, change, tmp_path):
    cache = open_cache(config.data)
    held_out = HeldOut.open(cache, config)
    about = describe(config, tmp_path / "mine", cache, held_out)
    assert (about["name"], about["method"]) == ("mine", "midas")
    other = change(config, name="first try", growth={"operator": None})
    about = describe(other, tmp_path / "mine", cache, held_out)
    assert (about["name"], about["method"]) == ("first try", "full depth")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"data": {"sequence_length": 128}}, "data_digest"),
        ({"data": {"extra_ids": 3}}, "vocabulary"),
        ({"eval_batches": 1}, "eval_digest"),
        ({"batch_size": 16}, "batch_size"),
        ({"optimizer": {"name": "adafactor"}}, "optimizer"),
        ({"optimizer": {"peak_learning_rate": 0.5}}, "peak_learning_rate"),
        ({"optimizer": {"schedule": "wsd"}}, "schedule"),
        ({"optimizer": {"warmup_fraction": 0.3}}, "schedule"),
        ({"optimizer": {"weight_decay": 0.3}}, "optimizer_settings"),
        ({"optimizer": {"clip_norm": None}}, "optimizer_settings"),
        ({"optimizer": {"beta2": 0.999}}, "optimizer_settings"),
        ({"optimizer": {"depth_rates": [1.0, 0.5]}}, "optimizer_settings"),
        ({"z_loss": 1e-4}, "optimizer_settings"),
        ({"model": {"d_ff": 96}}, "model"),
        ({"seed": 4}, "seed"),
    ],
)
def test_what_makes_runs_differ_is_recorded(config, change, compared, settings, key):
    assert compared(change(config, **settings))[key] != compared()[key]


def test_schedule_and_settings_are_told_by_what_is_in_use(config, change, compared):
    wsd = {"schedule": "wsd", "warmup_fraction": 0, "decay_fraction": 0.1}
    told = compared(change(config, optimizer=wsd))
    assert told["schedule"] == (
        "wsd, warmup_fraction=0.0, decay_fraction=0.1, final_fraction=0.1"
    )
    # A cosine has no such decay, and one number has one text.
    odd = change(config, optimizer={"decay_fraction": 0.1, "clip_norm": 1})
    assert compared(odd) == compared()
    rates = [change(config, optimizer={"depth_rates": rates}) for rates in ((1, 0.5), [1.0, 0.5])]
    assert compared(rates[0]) == compared(rates[1])


def test_how_a_run_is_computed_makes_no_difference(config, change, compared):
    other = change(
        config, model={"stack": "scan", "remat": "full"}, log_every=7, growth={"operator": None},
        mesh={"fsdp": 4, "tensor": 2},
    )
    assert compared(other) == compared()


def test_an_unfinished_run_says_what_it_is(stopped, reference):
    """In config.json, where reports look until there is a summary."""
    recorded = json.loads((stopped / "config.json").read_text())
    summary = json.loads((reference / "summary.json").read_text())
    assert recorded["method"] == "midas" and recorded["name"] == "run"
    assert recorded["comparability"] == summary["comparability"]
