"""What tables and reports need to know of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stacking_jax.data import MixedCache, PackedCache
from stacking_jax.models.config import HOW_COMPUTED
from stacking_jax.training import run_directory
from stacking_jax.training.config import OptimizerConfig, TrainConfig
from stacking_jax.training.decisions import Decision
from stacking_jax.training.held_out import HeldOut
from stacking_jax.training.recorder import Recorder
from stacking_jax.training.settings import is_number
from stacking_jax.training.state import TrainState, params_digest

_SHARES = ("chunk_tokens", "loss_tokens")
# What each schedule reads of OptimizerConfig beside its peak.
_SHAPES = {
    "cosine": ("warmup_fraction", "final_fraction"),
    "constant": ("warmup_fraction",),
    "wsd": ("warmup_fraction", "decay_fraction", "final_fraction"),
}
# Of OptimizerConfig, what has a key of its own in `comparability`.
_SCHEDULE = ("schedule", "warmup_fraction", "decay_fraction", "final_fraction")
_NAMED = ("name", "peak_learning_rate", *_SCHEDULE)


def describe(
    config: TrainConfig, run_dir: Path, cache: PackedCache | MixedCache, held_out: HeldOut,
    passes: dict[str, float] | None = None,
) -> dict:
    """What is known before the first step: the names, and what decides comparability.

    Two runs are compared only where `comparability` agrees (the seed may differ).
    Of a mixture or of UL2, `data` says how often each source is read (`epochs`), and
    of each objective its share of the text and of the tokens that carry loss.
    """
    model = dataclasses.asdict(config.model)
    for how in HOW_COMPUTED:
        model.pop(how)
    if not model["bidirectional_prompts"]:
        del model["bidirectional_prompts"]
    vocabulary = cache.manifest.vocabulary
    named = len(cache.sources) > 1 or config.data.is_ul2
    return {
        "name": config.name or run_dir.name,
        "method": config.method,
        "comparability": {
            "data_digest": cache.manifest.digest,
            "vocabulary": f"{vocabulary.name} ({vocabulary.digest[:12]})",
            "eval_digest": held_out.digest,
            "batch_size": config.batch_size,
            "sequence_length": config.data.sequence_length,
            "optimizer": config.optimizer.name,
            "peak_learning_rate": config.optimizer.peak_learning_rate,
            "schedule": _schedule(config.optimizer),
            "optimizer_settings": _optimizer_settings(config),
            "model": ", ".join(f"{name}={value}" for name, value in model.items()),
            "seed": config.seed,
        },
        **({"data": {"epochs": passes or {}, **_objectives(cache)}} if named else {}),
    }


def _schedule(config: OptimizerConfig) -> str:
    """'wsd, warmup_fraction=0.02, ...': the kind, and the shares that it goes by."""
    shares = (f"{name}={_number(getattr(config, name))}" for name in _SHAPES[config.schedule])
    return ", ".join((config.schedule, *shares))


def _optimizer_settings(config: TrainConfig) -> str:
    """What else the update depends on, where it is not the default.

    A default is what versions that did not know the setting did, so that their runs agree.
    """
    settings = [field for field in dataclasses.fields(OptimizerConfig) if field.name not in _NAMED]
    values = {
        field.name: (getattr(config.optimizer, field.name), field.default) for field in settings
    }
    values["z_loss"] = (config.z_loss, type(config).z_loss)
    return ", ".join(
        f"{name}={_number(value)}" for name, (value, default) in values.items() if value != default
    ) or "defaults"


def _number(value: Any) -> Any:
    """One text per value: 1 and 1.0 are the same, and so are tuples and lists."""
    if isinstance(value, list | tuple):
        return [_number(item) for item in value]
    return float(value) if is_number(value) else value


def _objectives(cache: PackedCache | MixedCache) -> dict:
    counts: dict[str, dict[str, float]] = {}
    for name, source in cache.sources.items():
        info = source.manifest.splits["train"]
        for objective, of in info.objectives.items():
            share = counts.setdefault(objective, {"chunk_tokens": 0.0, "loss_tokens": 0.0})
            for what in share:
                share[what] += cache.rates[name] * of[what] / info.tokens
    totals = {what: sum(share[what] for share in counts.values()) for what in _SHARES}
    return {
        f"share_of_{what}": {name: share[what] / totals[what] for name, share in counts.items()}
        for what in _SHARES
        if counts
    }


def summarise(
    state: TrainState, recorder: Recorder, scores: dict[str, float], described: dict,
    decisions: Sequence[Decision] = (), own_teacher: dict | None = None,
) -> dict:
    """What is known after the last step.

    Args:
      state: the final state.
      recorder: with the counters and the clock.
      scores: the last held-out evaluation.
      described: the plan as it was carried out, and its costs.
      decisions: taken on the way.
      own_teacher: the summary of the teacher that the run has trained, if it has.

    Returns:
      Losses in nats per token; `tokens` without padding; `model_flops` forward and
      backward, head and full attention included, padding and what choosing cost too
      (`choice_flops`); seconds over all restarts; `params_digest`, the SHA-256 over the
      final parameters. What a teacher cost is in FLOPs and seconds, and by itself under
      `teacher`.
    """
    plan, counters = recorder.plan, recorder.counters
    seconds = recorder.clock.read()
    stages = [
        counted | {"model_flops": planned["flops"]}
        for counted, planned in zip(counters.stages, described["stages"], strict=True)
    ]
    return {
        "final_step": int(state.step),
        "total_steps": plan.total_steps,
        "params_digest": params_digest(state.params),
        "train_loss": counters.train_loss,
        **scores,
        "tokens": counters.tokens,
        "skipped_steps": counters.skipped,
        "model_flops": described["model_flops"],
        "wall_seconds": recorder.clock.wall,
        "train_seconds": seconds["step"] + (own_teacher["train_seconds"] if own_teacher else 0.0),
        "compile_seconds": seconds["compile"],
        "seconds": seconds,
        "growths": list(plan.growth_steps),
        "params": described["params"],
        "depth": plan.final_depth,
        "run_depth": plan.final_run_depth,
        "speedup_blocks": described["speedup_blocks"],
        "speedup_model": described["speedup_model"],
        "stages": stages,
        **({"decisions": list(decisions)} if decisions else {}),
        **{name: described[name] for name in ("choice_flops",) if name in described},
        "versions": run_directory.versions(),
        **_teaching(described, own_teacher),
    }


def _teaching(described: dict, own_teacher: dict | None) -> dict:
    if "teacher" not in described:
        return {}
    both = ("model_flops_without_teacher_training", "model_flops_with_teacher_training")
    own = {}
    if own_teacher is not None:
        kept = ("total_steps", "tokens", "eval_loss", "wall_seconds", "train_seconds")
        own = {"trained": {name: own_teacher[name] for name in kept}}
    return {name: described[name] for name in both} | {"teacher": described["teacher"] | own}
