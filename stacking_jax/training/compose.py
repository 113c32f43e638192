"""Which methods can be parts of one run, and why the others cannot.

A method that others are to know of has a line in `METHODS` and one in `PAIRS` for each method
that stands before it. `docs/methods.md` shows the table.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from stacking_jax.errors import UserError

if TYPE_CHECKING:
    from stacking_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Method:
    """One method, as a run's settings know it.

    Attributes:
      what: a few words for people, as the subject of a sentence.
      setting: what switches it on.
      used: the name that tables give it in a run, '' for one without a name of its own; None
        where the run does not use it.
    """

    what: str
    setting: str
    used: Callable[[TrainConfig], str | None]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Whether two methods compose, and the reason."""

    composes: bool
    reason: str


METHODS: dict[str, Method] = {
    "growth": Method(
        "growth", "GrowthConfig.operator or .stages",
        lambda config: _growth(config) if config.growth.grows else None,
    ),
    "raptr": Method(
        "RaPTr", "PathConfig.method = 'raptr'",
        lambda config: "raptr" if config.paths.method == "raptr" else None,
    ),
    "layer_drop": Method(
        "layer drop", "PathConfig.method = 'layer_drop'",
        lambda config: "layer_drop" if config.paths.method == "layer_drop" else None,
    ),
    "depth_rates": Method(
        "learning rates by depth", "OptimizerConfig.depth_rates",
        lambda config: None if config.optimizer.depth_rates is None else "",
    ),
    "loops": Method("loops", "LoopConfig.loops", lambda config: config.loops.method),
    "similarity": Method(
        "the pull of layers towards each other", "SimilarityConfig.weight",
        lambda config: config.similarity.method,
    ),
    "salt": Method("a teacher", "DistillConfig.fraction", lambda config: config.distill.method),
    "choice": Method(
        "decisions in the run", "ChoiceConfig.candidates or .trigger",
        lambda config: config.choice.method or None,
    ),
}


def _growth(config: TrainConfig) -> str:
    """The operator, which says nothing where every growth is chosen in the run."""
    chosen = config.choice.candidates is not None and config.choice.trigger is None
    return "" if chosen else config.growth.method


_TWO_SCHEDULES = (
    "both say how deep a step is: growth of the layers that are stored, paths of a stack whose "
    "layers are all there"
)
_PULLED = "stored layers are pulled, whether a step runs them or not"
_NOTHING_GROWS = "a decision is about how or when the stack grows, and nothing grows"
_TAUGHT_PATHS = "the path learns from the labels of a teacher that runs whole"
_LOOPED_PATHS = "a path is drawn from a stack in which every layer runs once"
_RATES = "a factor belongs to a stored layer, whether a step runs it or not"

PAIRS: dict[tuple[str, str], Pair] = {
    ("growth", "raptr"): Pair(False, _TWO_SCHEDULES),
    ("growth", "layer_drop"): Pair(False, _TWO_SCHEDULES),
    ("raptr", "layer_drop"): Pair(
        False, "one lets paths grow longer, the other shorter; PathConfig.method names one of them"
    ),
    ("growth", "depth_rates"): Pair(
        True, "the factors are spread over the layers that each stage stores"
    ),
    ("raptr", "depth_rates"): Pair(True, _RATES),
    ("layer_drop", "depth_rates"): Pair(True, _RATES),
    ("growth", "loops"): Pair(
        True, "where LoopConfig.tie_at ties what has grown; a stack that loops from the start does "
        "not grow"
    ),
    ("raptr", "loops"): Pair(False, _LOOPED_PATHS),
    ("layer_drop", "loops"): Pair(False, _LOOPED_PATHS),
    ("depth_rates", "loops"): Pair(True, _RATES),
    ("growth", "similarity"): Pair(True, "stages of two blocks or more are pulled"),
    ("raptr", "similarity"): Pair(True, _PULLED),
    ("layer_drop", "similarity"): Pair(True, _PULLED),
    ("depth_rates", "similarity"): Pair(True, _RATES),
    ("growth", "salt"): Pair(True, "growths may come within the taught steps and behind them"),
    ("raptr", "salt"): Pair(True, _TAUGHT_PATHS),
    ("layer_drop", "salt"): Pair(True, _TAUGHT_PATHS),
    ("depth_rates", "salt"): Pair(True, "labels change the loss, and nothing of the update"),
    ("loops", "salt"): Pair(True, "with the loss on the last loop alone"),
    ("similarity", "salt"): Pair(True, "the pull is added to the gradient of either loss"),
    ("growth", "choice"): Pair(True, "how and when to grow is what is decided"),
    ("raptr", "choice"): Pair(False, _NOTHING_GROWS),
    ("layer_drop", "choice"): Pair(False, _NOTHING_GROWS),
    ("depth_rates", "choice"): Pair(True, "the factors are spread over whatever is stored"),
    ("loops", "choice"): Pair(
        False, "the map of a loop is a part of the plan, which a decision would have to change too"
    ),
    ("similarity", "choice"): Pair(True, "candidates are pulled as the run is"),
    ("salt", "choice"): Pair(
        False, "where the teacher leaves is a boundary of the plan, and candidates train without it"
    ),
    ("loops", "similarity"): Pair(False, "layers that are tied are alike already"),
}


def used(config: TrainConfig) -> dict[str, str]:
    """The methods that a run uses, with the names that tables give them."""
    found = {key: method.used(config) for key, method in METHODS.items()}
    return {key: name for key, name in found.items() if name is not None}


def name_of(config: TrainConfig) -> str:
    """What tables call the run's method: 'midas', 'raptr', 'midas + salt', 'full depth'."""
    return " + ".join(name for name in used(config).values() if name) or "full depth"


def check(config: TrainConfig) -> None:
    """Raises UserError, with the reason, if the run uses two methods that do not compose."""
    for one, other in itertools.combinations(used(config), 2):
        pair = PAIRS[one, other]
        if not pair.composes:
            first, second = METHODS[one], METHODS[other]
            raise UserError(
                f"{first.what} ({first.setting}) and {second.what} ({second.setting}) exclude "
                f"each other: {pair.reason}"
            )


def table() -> list[str]:
    """The table as lines of Markdown, in the order of `METHODS`."""
    lines = ["| one | other | together | because |", "|---|---|---|---|"]
    for one, other in itertools.combinations(METHODS, 2):
        pair = PAIRS[one, other]
        lines.append(
            f"| {METHODS[one].what} | {METHODS[other].what} | "
            f"{'yes' if pair.composes else 'refused'} | {pair.reason} |"
        )
    return lines
