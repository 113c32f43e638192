"""What may stand in a list of ways to grow."""

from __future__ import annotations

import pytest

from stacking_jax.errors import UserError
from stacking_jax.growth import growth_map
from stacking_jax.training import GrowthConfig
from stacking_jax.training.candidates import Candidate, candidates_of


@pytest.mark.parametrize(
    ("entry", "name", "sources"),
    [
        ("midas", "midas", growth_map("midas", 4, 6, block=2).sources),
        ({"operator": "gradstack", "block": 2}, "gradstack 2", (0, 1, 2, 3, 2, 3)),
        ([0, 0, 1, 2, 3, 3], "map 0 0 1 2 3 3", (0, 0, 1, 2, 3, 3)),
        ({"map": [0, 1, 2, 3, -1, -1], "name": "new on top"}, "new on top", (0, 1, 2, 3, -1, -1)),
        ({"operator": "midas", "init": "identity"}, "midas identity", None),
    ],
)
def test_a_candidate_leads_from_depth_to_depth(entry, name, sources):
    candidate = Candidate.of(entry)
    grow_map, _ = candidate.growth_into(4, 6)
    assert candidate.name == name and len(grow_map) == 6 and grow_map.stored == 4
    assert sources is None or grow_map.sources == sources


def test_layers_at_the_ends_are_kept_by_operators():
    grow_map, operator = Candidate.of("gradstack").growth_into(4, 6, keep_last=1)
    assert grow_map == growth_map("gradstack", 4, 6, keep_last=1) and operator == "gradstack"


def test_settings_of_its_own_stand_in_place_of_those_of_the_run():
    growth = GrowthConfig(operator="midas", init="noise", init_options={"relative": 0.1})
    assert Candidate.of("midas").growth_config(growth) == growth
    own = Candidate.of({"operator": "midas", "init": "identity", "moments": "zero"})
    found = own.growth_config(growth)
    assert (found.init, found.init_options, found.moments) == ("identity", None, "zero")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (["midas"], "two or more"),
        ("midas,lidas", "is a list"),
        (["midas", "midass"], "no growth operator 'midass'"),
        (["midas", {"block": 2}], "a candidate is"),
        (["midas", {"operator": "midas", "map": [0]}], "a candidate is"),
        (["midas", 3], "a candidate is"),
        (["midas", {"operator": "midas"}], "'midas' twice"),
    ],
)
def test_what_is_no_list_of_candidates_is_refused_in_one_line(entries, said):
    with pytest.raises(UserError, match=said) as caught:
        candidates_of(entries, "ChoiceConfig.candidates")
    assert "\n" not in str(caught.value)


def test_a_growth_that_does_not_lead_there_names_the_candidate():
    with pytest.raises(UserError, match="'midas 3' does not lead from 4 to 6 layers"):
        Candidate.of({"operator": "midas", "block": 3}).growth_into(4, 6)
