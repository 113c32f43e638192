"""A way to grow into a stage, as one of several to choose from (LAG, arXiv 2406.02469)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from stacking_jax.errors import UserError
from stacking_jax.growth import OPERATORS, DepthMap, Plan
from stacking_jax.training.growth_config import GrowthConfig

_SETTINGS = ("init", "init_options", "moments")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to grow.

    Attributes:
      name: what tables call it.
      growth: an operator's name, a dict of its arguments, or a list of source layers, as
        `growth.Plan.custom` takes them.
      settings: what it sets in place of `GrowthConfig`'s `init`, `init_options`, `moments`.
    """

    name: str
    growth: Any
    settings: dict[str, Any]

    @classmethod
    def of(cls, entry: Any) -> Candidate:
        """From a setting.

        Args:
          entry: an operator's name; a list of source layers; or a dict with 'operator' and
            its arguments, or with 'map', and with 'name', 'init', 'init_options' and
            'moments' beside them where they are to differ.

        Raises:
          UserError: for anything else.
        """
        if isinstance(entry, str):
            return cls(entry, _known(entry), {})
        if isinstance(entry, Mapping):
            rest = dict(entry)
            settings = {name: rest.pop(name) for name in _SETTINGS if name in rest}
            name = rest.pop("name", None)
            if set(rest) == {"map"} and _is_map(rest["map"]):
                growth, short = list(rest["map"]), _map_name(rest["map"])
            elif isinstance(rest.get("operator"), str) and "map" not in rest:
                _known(rest["operator"])
                growth, short = rest, " ".join(str(value) for value in rest.values())
            else:
                raise _wrong(entry)
            if name is None:
                name = " ".join([short, *(str(settings[key]) for key in sorted(settings))])
            if not isinstance(name, str):
                raise _wrong(entry)
            return cls(name, growth, settings)
        if _is_map(entry):
            return cls(_map_name(entry), list(entry), {})
        raise _wrong(entry)

    def growth_into(
        self, depth: int, to: int, keep_first: int = 0, keep_last: int = 0
    ) -> tuple[DepthMap, str]:
        """Its map from one depth to another, and the operator's name for people.

        Raises:
          UserError: if it does not lead there.
        """
        growth = self.growth
        guards = {"keep_first": keep_first, "keep_last": keep_last}
        guards = {name: layers for name, layers in guards.items() if layers}
        if guards and not isinstance(growth, list):
            growth = guards | ({"operator": growth} if isinstance(growth, str) else growth)
        try:
            stage = Plan.custom([(depth, 1), (to, 1, growth)]).stages[1]
        except UserError as error:
            raise UserError(
                f"the candidate {self.name!r} does not lead from {depth} to {to} layers: {error}"
            ) from error
        return stage.grow_map, stage.operator

    def growth_config(self, growth: GrowthConfig) -> GrowthConfig:
        """The settings with those that this candidate has of its own.

        Raises:
          UserError: if there is no such start or policy.
        """
        settings = dict(self.settings)
        if "init" in settings:
            settings.setdefault("init_options", None)
        return dataclasses.replace(growth, **settings)


def candidates_of(entries: Any, what: str) -> list[Candidate]:
    """All of a list of settings; `what` names the setting.

    Raises:
      UserError: if it is no list, holds fewer than two, or two of one name.
    """
    if not isinstance(entries, list | tuple) or len(entries) < 2:
        raise UserError(
            f"{what} is a list of two or more ways to grow, such as ['midas', 'gradstack']; got "
            f"{entries!r}"
        )
    found = [Candidate.of(entry) for entry in entries]
    names = [candidate.name for candidate in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{what} names {twice[0]!r} twice; give each of them a 'name' of its own, as in "
            "{'operator': 'midas', 'init': 'identity', 'name': 'midas, silent'}"
        )
    return found


def _known(operator: str) -> str:
    if operator not in OPERATORS:
        raise UserError(
            f"there is no growth operator {operator!r}; there are {', '.join(sorted(OPERATORS))}"
        )
    return operator


def _is_map(entry: Any) -> bool:
    return isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) > 0 and all(
        isinstance(layer, int) and not isinstance(layer, bool) for layer in entry
    )


def _map_name(layers: Sequence[int]) -> str:
    return "map " + " ".join(str(layer) for layer in layers)


def _wrong(entry: Any) -> UserError:
    return UserError(
        "a candidate is an operator's name, a list of source layers, or a dict with 'operator' or "
        f"'map', and 'name', 'init', 'init_options', 'moments' where they differ; got {entry!r}"
    )
