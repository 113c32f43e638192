"""What a study compares, as plain settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stacking_jax.errors import UserError

ENDPOINTS = ("loss", "score")
_ARM_KEYS = ("gin", "bindings", "flops_of")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm: what is laid over the experiment.

    Attributes:
      name: for tables.
      gin: .gin files, laid over those of the experiment in this order.
      bindings: 'NAME=VALUE' in gin syntax, after the files.
      flops_of: the arm whose FLOPs decide how long this one trains; None: TRAIN_STEPS.
    """

    name: str
    gin: tuple[str, ...] = ()
    bindings: tuple[str, ...] = ()
    flops_of: str | None = None

    @property
    def folder(self) -> str:
        return folder_name(self.name)


def folder_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", name).strip("_.") or "arm"


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """A grid of runs, arms × seeds, and what is asked of it. Decided before it is run.

    Attributes:
      name: for the report.
      experiment: the .gin files that all arms share.
      bindings: 'NAME=VALUE' for all arms, in gin syntax.
      imports: modules that register what the runs read (`--gin_import`).
      arms: name -> a dict of 'gin' (files laid over the experiment), 'bindings' and
        'flops_of', an arm: this one trains for as many steps as cost the FLOPs of that one,
        with a schedule that ends there. An arm without it trains for TRAIN_STEPS.
      sweep: macro or parameter -> values; every arm is run with each combination, as an arm
        of its own ('midas, LEARNING_RATE=0.002').
      seeds: of the initial values and the order of the data, the same for all arms.
      tasks: names of evaluation tasks that every run ends with; their mean is the endpoint
        'score'. None: the loss alone.
      comparisons: [arm, reference] pairs whose differences are to be relied on; they share
        one error rate, over all endpoints (Holm).
      endpoints: of them, 'loss' (held-out, final) and 'score'.
      exploratory: arms that are shown and never tested.
      noise_arm: its seeds, halved, are the A/A row; None: the first arm.
      informative: [arm, low, high]: where the mean score of this arm lies outside, the
        study has no evidence on 'score'. None: no such rule.
      may_differ: what arms may differ in beside their method, of the report's comparability
        ('peak_learning_rate', 'schedule', 'optimizer_settings', 'model', ...). A cell that
        differs in anything else is left out.

    Raises:
      UserError: a setting does not fit the others.
    """

    name: str = "study"
    experiment: Sequence[str] = ("gin/experiments/demo.gin",)
    bindings: Sequence[str] = ()
    imports: Sequence[str] = ()
    arms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sweep: Mapping[str, Any] | None = None
    seeds: Sequence[int] = (0, 1, 2)
    tasks: Sequence[str] | None = None
    comparisons: Sequence[Sequence[str]] = ()
    endpoints: Sequence[str] = ("loss",)
    exploratory: Sequence[str] = ()
    noise_arm: str | None = None
    informative: Sequence[Any] | None = None
    may_differ: Sequence[str] = ()

    def __post_init__(self):
        if not (isinstance(self.arms, Mapping) and self.arms):
            raise UserError("StudyConfig.arms is a dict of arms and has at least one")
        for name in ("experiment", "bindings", "imports", "exploratory", "may_differ"):
            _check_texts(f"StudyConfig.{name}", getattr(self, name))
        if self.tasks is not None:
            _check_texts("StudyConfig.tasks", self.tasks)
        self._check_seeds()
        arms = self.all_arms()
        names = [arm.name for arm in arms]
        for arm in arms:
            if arm.flops_of is not None and arm.flops_of not in names:
                raise UserError(
                    f"the arm {arm.name!r} has the FLOPs of {arm.flops_of!r}, which is no arm"
                )
            if arm.flops_of == arm.name:
                raise UserError(f"the arm {arm.name!r} cannot have the FLOPs of itself")
        folders = [arm.folder for arm in arms]
        for folder in folders:
            if folders.count(folder) > 1:
                same = [arm.name for arm in arms if arm.folder == folder]
                raise UserError(f"the arms {same[0]!r} and {same[1]!r} need names that differ more")
        self._check_questions(set(names))

    def all_arms(self) -> tuple[Arm, ...]:
        """The arms in their order; of a sweep, each combination is one."""
        arms = [_arm(name, of) for name, of in self.arms.items()]
        for macro, values in (self.sweep or {}).items():
            if not (isinstance(values, list | tuple) and values):
                raise UserError(f"StudyConfig.sweep: {macro} needs a list of values")
            arms = [_with(arm, f"{macro}={value!r}") for arm in arms for value in values]
        return tuple(arms)

    def _check_seeds(self) -> None:
        seeds = self.seeds
        whole = isinstance(seeds, list | tuple) and all(
            isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in seeds
        )
        if not whole or not seeds or len(set(seeds)) != len(seeds):
            raise UserError(
                f"StudyConfig.seeds are different whole numbers from 0; got {seeds!r}"
            )

    def _check_questions(self, names: set[str]) -> None:
        def check(what: str, name: Any) -> None:
            if name not in names:
                raise UserError(
                    f"StudyConfig.{what} names {name!r}; the arms are {', '.join(sorted(names))}"
                )

        for pair in self.comparisons:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise UserError(f"StudyConfig.comparisons are [arm, reference]; got {pair!r}")
            for name in pair:
                check("comparisons", name)
                if name in self.exploratory:
                    raise UserError(
                        f"the arm {name!r} is exploratory, so StudyConfig.comparisons cannot "
                        "rely on it"
                    )
        for name in self.exploratory:
            check("exploratory", name)
        if self.noise_arm is not None:
            check("noise_arm", self.noise_arm)
        if self.informative is not None:
            if not isinstance(self.informative, list | tuple) or len(self.informative) != 3:
                raise UserError(
                    f"StudyConfig.informative is [arm, low, high]; got {self.informative!r}"
                )
            check("informative", self.informative[0])
        if not set(self.endpoints) <= set(ENDPOINTS):
            raise UserError(
                f"StudyConfig.endpoints are of {', '.join(ENDPOINTS)}; got {self.endpoints!r}"
            )
        if "score" in self.endpoints and not self.tasks:
            raise UserError("the endpoint 'score' is a mean over StudyConfig.tasks: name some")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _arm(name: Any, of: Any) -> Arm:
    if not (isinstance(name, str) and name) or not isinstance(of, Mapping):
        raise UserError(
            "StudyConfig.arms are names and dicts, such as {'midas': {'gin': ['...']}}; "
            f"got {name!r}: {of!r}"
        )
    for key in of:
        if key not in _ARM_KEYS:
            raise UserError(f"the arm {name!r} has {', '.join(_ARM_KEYS)}, and no {key!r}")
    for key in ("gin", "bindings"):
        _check_texts(f"{key!r} of the arm {name!r}", of.get(key, ()))
    return Arm(
        name, tuple(of.get("gin", ())), tuple(of.get("bindings", ())), of.get("flops_of")
    )


def _with(arm: Arm, binding: str) -> Arm:
    value = binding.partition("=")
    short = f"{value[0].rpartition('.')[2]}={value[2]}"
    flops_of = None if arm.flops_of is None else f"{arm.flops_of}, {short}"
    return Arm(f"{arm.name}, {short}", arm.gin, (*arm.bindings, binding), flops_of)


def _check_texts(what: str, value: Any) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
        raise UserError(f"{what} is a list of texts; got {value!r}")
