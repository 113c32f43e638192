"""Everything that defines a run, as plain frozen dataclasses."""

from __future__ import annotations

import dataclasses
from typing import Any

from stacking_jax.data import DataConfig
from stacking_jax.errors import UserError
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.growth import ModelCosts, Plan
from stacking_jax.models import DecoderConfig
from stacking_jax.training import compose
from stacking_jax.training.charges import charged, forecast
from stacking_jax.training.choice_config import ChoiceConfig
from stacking_jax.training.distill_config import DistillConfig
from stacking_jax.training.growth_config import GrowthConfig, aligned
from stacking_jax.training.loop_config import LoopConfig
from stacking_jax.training.path_config import PathConfig
from stacking_jax.training.rules import AXES, Rules
from stacking_jax.training.settings import check_not_negative, check_whole, is_number
from stacking_jax.training.similarity_config import SimilarityConfig
from stacking_jax.training.spike_config import SpikeConfig


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser and its learning rate over the global step.

    Attributes:
      name: 'adamw', 'adafactor' or 'muon'.
      peak_learning_rate: after warm-up.
      final_fraction: the last step's rate over the peak's.
      schedule: 'cosine', 'constant', or 'wsd' (warm-up, stable, linear decay).
      warmup_fraction: share of all steps in which the rate rises linearly.
      decay_fraction: share of all steps in which 'wsd' decays.
      weight_decay: decoupled, on matrices only, times the learning rate.
      clip_norm: gradients with a larger global norm are scaled down; None: never.
      beta1, beta2, epsilon: of AdamW, also where Muon leaves a tensor to it.
      muon_beta: momentum of Muon.
      factored_decay: exponent of Adafactor's second-moment decay, 1 − t^(−c).
      depth_rates: factors of the learning rate by depth: points at even distances from the
        first stored layer to the last, with straight lines between them; as many as there are
        layers, and each has its own. Embedding, last norm and head keep the rate. None: 1.
    """

    name: str = "adamw"
    peak_learning_rate: float = 1e-3
    final_fraction: float = 0.1
    schedule: str = "cosine"
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    muon_beta: float = 0.95
    factored_decay: float = 0.8
    depth_rates: list[float] | None = None

    def __post_init__(self):
        for name, known in (
            ("name", ("adamw", "adafactor", "muon")), ("schedule", ("cosine", "constant", "wsd"))
        ):
            if getattr(self, name) not in known:
                raise UserError(
                    f"OptimizerConfig.{name} is one of {', '.join(known)}; "
                    f"got {getattr(self, name)!r}"
                )
        if not (is_number(self.peak_learning_rate) and self.peak_learning_rate > 0):
            raise UserError(
                "OptimizerConfig.peak_learning_rate must be a positive number; "
                f"got {self.peak_learning_rate!r}"
            )
        for name in ("final_fraction", "warmup_fraction", "decay_fraction"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value <= 1):
                raise UserError(f"OptimizerConfig.{name} is a share from 0 to 1; got {value!r}")
        for name in ("beta1", "beta2", "muon_beta"):
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value < 1):
                raise UserError(
                    f"OptimizerConfig.{name} is at least 0 and less than 1; got {value!r}"
                )
        for name in ("weight_decay", "epsilon", "factored_decay"):
            check_not_negative(f"OptimizerConfig.{name}", getattr(self, name))
        rates = self.depth_rates
        if rates is not None and not (
            isinstance(rates, list | tuple) and rates
            and all(is_number(rate) and rate >= 0 for rate in rates)
        ):
            raise UserError(
                "OptimizerConfig.depth_rates is a list of factors of at least 0, from the first "
                f"layer to the last; got {rates!r}"
            )
        clip = self.clip_norm
        if clip is not None and not (is_number(clip) and clip > 0):
            raise UserError(
                f"OptimizerConfig.clip_norm must be a positive number, or None; got {clip!r}"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis has; one of them may be -1, 'the rest'.

    Attributes:
      data: replicas of the parameters.
      fsdp: shards of parameters and optimiser state, which also split the batch.
      tensor: shards of heads, MLP width and vocabulary.
      sequence: shards of the length of every row; keys and values are gathered over them.
      slice: replicas that need no fast link between them: TPU slices joined by DCN.
      rules: axis of an array -> the mesh axes that split it, where that is to differ from
        `training.rules.TABLE`; e.g. {'embed': ('fsdp', 'sequence')}. None of it is whole.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1
    slice: int = 1
    rules: dict[str, Any] | None = None

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in AXES}
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in sizes.values())
        if (
            not whole or any(n < 1 and n != -1 for n in sizes.values())
            or list(sizes.values()).count(-1) > 1
        ):
            raise UserError(
                f"mesh {' × '.join(f'{name}={size!r}' for name, size in sizes.items())}: axes are "
                "positive whole numbers, and at most one is -1, 'the rest'"
            )
        Rules.of(self.rules)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      model, data, growth, optimizer, mesh, distill: see there.
      paths: which positions a training step runs; all by default.
      name: for tables and reports; None for the name of the run directory.
      total_steps: training steps over all stages.
      batch_size: records per step over all devices and hosts.
      microbatches: parts into which a batch is cut, one after the other.
      z_loss: weight of log²(Z).
      seed: of the initial values and the order of the data.
      eval_every: steps between evaluations on held-out data; 0: at the end only.
      eval_batches: held-out batches per evaluation; None for all.
      evaluate_tasks: names of evaluation tasks, a text with commas or a list; see
        `evaluation.registry.find`. They run at each stage's end and at the end.
      evaluate_every: steps between runs of them in between; 0: none.
      evaluation: how they run.
      log_every: steps between lines of metrics.jsonl.
      checkpoint_every: steps between checkpoints; 0: at the end only.
      keep_checkpoints: how many are kept, the newest ones.
      checkpoint_digests: note the SHA-256 of every file of a checkpoint and check it
        before reading; False: sizes alone.
      on_nan: 'stop' the run, or 'skip' the step, when loss or gradient is not finite.
      spikes: what to do about gradients that are finite, but far too large.
      loops: a block of layers that runs several times.
      similarity: a pull of layers towards those one block away.
      choice: what is decided while the run goes on: how it grows, and when.
      compilation_cache: folder of compiled programs; None for the user's cache
        folder, '' for none.
      compile_ahead: whether the next stage's programs are compiled in the background, while
        the present one trains.
      device_batches: batches that lie ready on the devices beside the one in use; 0: a
        batch is put there when its step begins.
      step_timeout: seconds in one step, or in waiting for its data, after which a process
        is stuck and ends; 0: never; None: 1800 with several processes, never with one.
      other_timeout: the same for what rightly takes longer: compiling, a program's first
        steps, an evaluation, a growth, a checkpoint.
      log_records: whether records-P.jsonl tells which records each step was given.
    """

    model: DecoderConfig
    data: DataConfig
    growth: GrowthConfig = GrowthConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    paths: PathConfig = PathConfig()
    name: str | None = None
    total_steps: int = 1000
    batch_size: int = 16
    microbatches: int = 1
    z_loss: float = 0.0
    seed: int = 0
    eval_every: int = 0
    eval_batches: int | None = None
    evaluate_tasks: str | list[str] | None = None
    evaluate_every: int = 0
    evaluation: EvaluationConfig = EvaluationConfig()
    log_every: int = 10
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    checkpoint_digests: bool = True
    on_nan: str = "stop"
    spikes: SpikeConfig = SpikeConfig()
    loops: LoopConfig = LoopConfig()
    similarity: SimilarityConfig = SimilarityConfig()
    distill: DistillConfig = DistillConfig()
    choice: ChoiceConfig = ChoiceConfig()
    compilation_cache: str | None = None
    compile_ahead: bool = True
    device_batches: int = 2
    step_timeout: float | None = None
    other_timeout: float = 7200.0
    log_records: bool = False

    def __post_init__(self):
        for name in ("total_steps", "batch_size", "microbatches", "log_every", "keep_checkpoints"):
            check_whole(f"TrainConfig.{name}", getattr(self, name), least=1)
        for name in (
            "eval_every", "evaluate_every", "checkpoint_every", "seed", "device_batches"
        ):
            check_whole(f"TrainConfig.{name}", getattr(self, name), least=0)
        if self.eval_batches is not None:
            check_whole("TrainConfig.eval_batches", self.eval_batches, least=1)
        for name in ("checkpoint_digests", "compile_ahead"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(
                    f"TrainConfig.{name} is True or False; got {getattr(self, name)!r}"
                )
        check_not_negative("TrainConfig.z_loss", self.z_loss)
        check_not_negative("TrainConfig.step_timeout", self.step_timeout or 0)
        check_not_negative("TrainConfig.other_timeout", self.other_timeout)
        if self.batch_size % self.microbatches:
            raise UserError(
                f"{self.microbatches} microbatches do not divide a batch of {self.batch_size}"
            )
        if self.on_nan not in ("stop", "skip"):
            raise UserError(f"TrainConfig.on_nan is 'stop' or 'skip'; got {self.on_nan!r}")
        if self.spikes.action == "rewind" and not self.checkpoint_every:
            raise UserError(
                "SpikeConfig.action = 'rewind' goes back to a checkpoint: bind "
                "TrainConfig.checkpoint_every to a number of steps"
            )
        self.loops.check_growth(self.growth)
        if self.distill.on and self.loops.loss_loops > 1:
            raise UserError(
                "a teacher's labels are learnt by the network as it is evaluated: set "
                f"LoopConfig.loss_loops to 1 (it is {self.loops.loss_loops}), or "
                "DistillConfig.fraction to 0"
            )

    @property
    def tokens_per_step(self) -> int:
        """Positions per step, padding included: what the hardware computes."""
        return self.batch_size * self.data.sequence_length

    @property
    def method(self) -> str:
        """What tables call it: the methods that make its plan and its steps."""
        return compose.name_of(self)

    def plan(self) -> Plan:
        """The stages of the run.

        Raises:
          UserError: if methods exclude each other, or settings do not fit the model's depth.
        """
        compose.check(self)
        params = self.model.costs(self.data.sequence_length).params(self.model.num_layers)
        growth = self.growth.timed(params, self.total_steps * self.tokens_per_step)
        plan = growth.plan(self.model.num_layers, self.total_steps)
        if growth.align_data:
            plan = aligned(plan, [step for step, _ in self.data.stages_of(self.total_steps)])
            growth.check_ramp(plan)
        plan = self.paths.apply(self.loops.apply(plan))
        self.similarity.check_plan(plan)
        self.choice.check(plan, growth)
        return self.distill.apply(plan, growth.ramp_steps)

    def without_methods(self) -> TrainConfig:
        """The same run with every method beside growth switched off, and growth as it is."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: defaults[name] for name in BESIDE_GROWTH})

    def costs(self) -> ModelCosts:
        """What a layer and all the rest cost, a teacher's forward pass included.

        Raises:
          UserError: if the teacher cannot be found.
        """
        costs = self.model.costs(self.data.sequence_length)
        if not self.distill.on:
            return costs
        from stacking_jax.training import teacher

        return dataclasses.replace(costs, teacher_flops=teacher.forward_flops(self))

    def describe_plan(self) -> dict:
        """The plan with its costs, as plain data.

        See `Plan.describe`, `charges.charged` and `teacher.charged`.
        """
        plan, costs = self.plan(), self.costs()
        described = self.named(charged(
            plan.describe(costs, self.tokens_per_step), self.tokens_per_step,
            forecast(self.choice, self.growth, plan, len(self.data.mixture or [None])),
        ))
        if not self.distill.on:
            return described
        from stacking_jax.training import teacher

        return teacher.charged(self, described)

    def named(self, described: dict) -> dict:
        """A described plan with the run's `method`, and the `trigger` of its growths if any."""
        return described | {"method": self.method, "trigger": self.choice.trigger}

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


BESIDE_GROWTH = ("distill", "loops", "similarity", "paths", "choice")
"""Settings of methods: a plain run has all of them at their defaults."""

# What may change when a run goes on: it decides how a run is carried out and
# watched, and no number that comes out of it.
OPERATIONAL = (
    "name", "mesh", "log_every", "eval_every", "checkpoint_every", "keep_checkpoints",
    "checkpoint_digests", "compilation_cache", "compile_ahead", "device_batches",
    "data.cache_dir", "evaluate_tasks",
    "evaluate_every", "evaluation", "spikes.limit", "spikes.limit_steps",
    "step_timeout", "other_timeout", "log_records",
    # Where a teacher lies; which one it is, `teacher.json` of the run says.
    "distill.teacher", "distill.teacher_step", "distill.cache",
)


def with_defaults(old: dict, config: Any) -> dict:
    """A configuration as an older version wrote it, with the settings that it did not know.

    A new setting's default is what versions without it did, so a run goes on.

    Args:
      old: plain data.
      config: the dataclass that it is held against; its own values are not read.
    """
    filled = dict(old)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            if isinstance(filled.get(field.name, {}), dict):
                filled[field.name] = with_defaults(filled.get(field.name, {}), value)
        elif field.name not in filled and field.default is not dataclasses.MISSING:
            filled[field.name] = field.default
    return filled


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Lines 'key: old -> new' for every setting that differs and is not operational."""
    lines = []
    for key in sorted(set(old) | set(new)):
        name = prefix + key
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if name in OPERATIONAL or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            lines.extend(differences(before, after, name + "."))
        else:
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines
