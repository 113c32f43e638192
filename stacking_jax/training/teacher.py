"""The teacher of a run: where it comes from, its shape and its cost, and its parameters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from stacking_jax.console import say
from stacking_jax.data import Bytes, VocabularyInfo, load_tokenizer
from stacking_jax.data.split_writer import file_sha256
from stacking_jax.data.teacher_cache import TeacherCache, open_teacher_cache
from stacking_jax.errors import UserError
from stacking_jax.growth import Stage
from stacking_jax.growth.plan import full_depth_steps
from stacking_jax.models import DecoderConfig
from stacking_jax.models.layer_stack import cast_matrices
from stacking_jax.paths import open_path
from stacking_jax.training import consensus, manifest
from stacking_jax.training.charges import spent
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.decisions import Decision, decided_plan
from stacking_jax.training.growing import refuse_open_ramp
from stacking_jax.training.mesh import LogicalMesh
from stacking_jax.training.run_directory import read_config
from stacking_jax.training.stack_runs import StackOf, inference_stack, plain_stack
from stacking_jax.training.state import abstract_params, shardings_of
from stacking_jax.training.telemetry import write_json
from stacking_jax.training.within_run import FOLDER, config_of_teacher

FILE = "teacher.json"
"""In a run directory: which teacher the run began with; another one is refused."""


@dataclasses.dataclass(frozen=True, eq=False)
class TeacherModel:
    """A teacher that runs beside the student.

    Attributes:
      kind: 'run' of ours, 'hugging_face' folder, or 'own': trained within the run.
      path: where it lies; None before the run directory is known.
      step: of its checkpoint; None of a folder.
      model: its shape, computed as the student is.
      stage: what of it is stored and what runs.
      run: its own configuration; None of a folder.
      taken: what it had decided by then: boundaries and choices.
    """

    kind: str
    path: Path | None
    step: int | None
    model: DecoderConfig
    stage: Stage
    run: TrainConfig | None = None
    taken: tuple[Decision, ...] = ()

    @property
    def stack(self) -> StackOf:
        """How its stack runs."""
        if self.run is None:
            return plain_stack
        stack = inference_stack(self.run, self.stage)
        return lambda step: stack(self.step)

    def forward_flops(self, sequence_length: int) -> float:
        """Forward FLOPs per token, head and full attention included."""
        costs = self.model.costs(sequence_length)
        return costs.flops_per_token(self.stage.run_depth) / 3

    @property
    def params(self) -> int:
        return self.model.costs(1).params(self.stage.depth)

    def training_flops(self) -> float | None:
        """What it took to train it: its trials and its own teacher too; None: not known."""
        if self.run is None or not self.step:
            return None
        costs, tokens = self.run.costs(), self.run.tokens_per_step
        plan = decided_plan(self.run.plan(), self.taken)
        trials = tokens * sum(
            steps * plan.stages[number].flops_per_token(costs)
            for number, steps in spent(self.taken).items()
        )
        return plan.flops_until(self.step, costs, tokens) + trials + own_flops(self.run)

    def abstract(self, mesh: LogicalMesh) -> Any:
        """Shapes, dtypes and shardings of what `load` gives."""
        params = abstract_params(self.model, self.stage.depth, mesh)
        low = jax.eval_shape(functools.partial(cast_matrices, dtype=self.model.dtype), params)
        return jax.tree.map(
            lambda leaf, like: leaf.update(dtype=like.dtype), params, low
        )

    def load(self, mesh: LogicalMesh) -> Any:
        """Its parameters straight in their shards, matrices in the dtype of the computation.

        Raises:
          UserError: if they cannot be read.
        """
        wanted = abstract_params(self.model, self.stage.depth, mesh)
        if self.kind == "hugging_face":
            from stacking_jax.interop import import_params

            whole, _ = import_params(self.path)
            params = jax.tree.map(
                lambda leaf, values: jax.make_array_from_callback(
                    leaf.shape, leaf.sharding, lambda index: values[index]
                ),
                wanted, whole,
            )
        else:
            with _checkpoints(self.path, self.run) as checkpoints:
                params = checkpoints.restore_params(self.step, lambda depth: wanted)
        cast = jax.jit(
            functools.partial(cast_matrices, dtype=self.model.dtype),
            out_shardings=shardings_of(wanted),
        )
        return cast(params)


def find(config: TrainConfig) -> TeacherModel | None:
    """The teacher that runs beside the student; None where its labels come out of a cache.

    Raises:
      UserError: if there is none at the path, or our decoder cannot compute it.
    """
    distill = config.distill
    if not distill.on or distill.cache is not None:
        return None
    if distill.teacher is None:
        own = config_of_teacher(config)
        return _computed_as(
            config, TeacherModel("own", None, own.total_steps, own.model, own.plan().stages[-1],
                                 own)
        )
    return _computed_as(config, at(distill.teacher, distill.teacher_step))


def at(path: str, step: int | None) -> TeacherModel:
    """The teacher of a path; see `DistillConfig.teacher`.

    Raises:
      UserError: if there is none, or no such checkpoint.
    """
    place = open_path(path)
    if (place / "checkpoints").is_dir():
        return _of_run(str(place), step)
    from stacking_jax.interop import hugging_face

    if hugging_face.is_folder(place):
        if step is not None:
            raise UserError(
                f"DistillConfig.teacher_step = {step} names a checkpoint, but {path} is a Hugging "
                "Face folder, which has none"
            )
        return _of_folder(str(place))
    raise UserError(
        f"DistillConfig.teacher: {path} is neither a run directory with checkpoints nor a "
        "Hugging Face folder with a config.json"
    )


def labels_of(config: TrainConfig) -> TeacherCache | None:
    """The cache that labels are read from; None where a teacher runs, or there is none."""
    if not config.distill.on or config.distill.cache is None:
        return None
    return _opened(str(Path(config.distill.cache).expanduser().absolute()))


# ---- What it costs ---------------------------------------------------------------------------


def forward_flops(config: TrainConfig) -> float:
    """Forward FLOPs per token of the run's teacher; of a cache, of the one that made it."""
    labels = labels_of(config)
    if labels is not None:
        return labels.manifest.forward_flops
    return find(config).forward_flops(config.data.sequence_length)


def own_flops(config: TrainConfig) -> float:
    """FLOPs that the run spends on training its own teacher; 0 where it has another."""
    if not config.distill.trains_teacher:
        return 0.0
    own = config_of_teacher(config)
    return own.plan().flops(own.costs(), own.tokens_per_step)


def charged(config: TrainConfig, described: dict[str, Any]) -> dict[str, Any]:
    """A described plan with what the teacher costs.

    `model_flops` counts what the run spends: the teacher's forward passes, and its training
    where the run trains it. `model_flops_without_teacher_training` and
    `model_flops_with_teacher_training` (None where that is not known) count both ways.
    """
    labels, model = labels_of(config), find(config)
    own = own_flops(config)
    if labels is not None:
        training, about = labels.manifest.training_flops, dict(labels.manifest.teacher)
        kind, params = "cache", about.get("params")
    else:
        training, kind, params = model.training_flops(), model.kind, model.params
    without = described["model_flops"]
    layers = described["model_flops_without_head"]
    speedup = described["speedup_model"] * without / (without + own)
    return described | {
        "model_flops": without + own,
        "model_flops_without_head": layers + own,
        "model_flops_without_attention": described["model_flops_without_attention"] + own,
        "full_depth_steps": full_depth_steps(described["total_steps"], speedup),
        "speedup_blocks": described["speedup_blocks"] * layers / (layers + own),
        "speedup_model": speedup,
        "model_flops_without_teacher_training": without,
        "model_flops_with_teacher_training": None if training is None else without + training,
        "teacher": {
            "kind": kind, "params": params, "steps": config.distill.steps(config.total_steps),
            "forward_flops_per_token": forward_flops(config), "training_flops": training,
            "trained_within_the_run": bool(own),
        },
    }


# ---- Which it is -----------------------------------------------------------------------------


def settle(config: TrainConfig, run_dir: Path) -> TrainConfig:
    """The configuration with the teacher's step filled in: once begun with, it stays that one.

    Raises:
      UserError: if there is no teacher, or another one than the run began with.
    """
    if not config.distill.on:
        return config
    before = _recorded(run_dir)
    distill = config.distill
    if distill.teacher is not None and distill.teacher_step is None and before:
        distill = dataclasses.replace(distill, teacher_step=before.get("step"))
        config = dataclasses.replace(config, distill=distill)
    model = find(config)
    if model is not None and model.kind == "run":
        distill = dataclasses.replace(distill, teacher_step=model.step)
        config = dataclasses.replace(config, distill=distill)
    if before and before != identity(config):
        raise UserError(
            f"{run_dir} began with another teacher ({_words(before)}, now "
            f"{_words(identity(config))}); bind DistillConfig to that one, or use another "
            "--run_dir"
        )
    return config


def record(config: TrainConfig, run_dir: Path) -> None:
    """Writes which teacher the run begins with."""
    if config.distill.on and jax.process_index() == 0 and not (run_dir / FILE).exists():
        write_json(run_dir / FILE, identity(config))


def identity(config: TrainConfig) -> dict[str, Any]:
    """What tells a teacher from another: `kind`, `step`, and a `digest` of what it consists of."""
    labels, model = labels_of(config), find(config)
    if labels is not None:
        return {"kind": "cache", "step": None, "digest": labels.manifest.digest}
    # The configuration of its own teacher follows from the run's.
    digest = None
    if model.kind != "own":
        digest = consensus.from_first(_digest(str(model.path), model.step))
    return {"kind": model.kind, "step": model.step, "digest": digest}


def check_vocabulary(config: TrainConfig, vocabulary: VocabularyInfo) -> None:
    """Raises UserError for a teacher with another vocabulary than the data's.

    Args:
      config: of the student.
      vocabulary: of its data.
    """
    labels, model = labels_of(config), find(config)
    rows = labels.manifest.vocab_size if labels is not None else model.model.vocab_size
    what = config.distill.cache or config.distill.teacher or "the run's own teacher"
    if rows != config.model.vocab_size:
        raise UserError(
            f"a teacher with another vocabulary: {what} has {rows} ids, the student "
            f"{config.model.vocab_size}; choose a teacher of the same vocabulary, or bind "
            f"DecoderConfig.vocab_size = {rows} if the ids mean the same"
        )
    wanted = config.distill.top_k
    if wanted is not None and wanted > rows:
        raise UserError(
            f"DistillConfig.top_k = {wanted} is more than the {rows} ids of the vocabulary"
        )
    if labels is not None:
        if wanted is not None and wanted > labels.manifest.top_k:
            raise UserError(
                f"DistillConfig.top_k = {wanted}, but {what} holds {labels.manifest.top_k} tokens "
                "each: make it anew with more, or ask for fewer"
            )
        return  # `TeacherCache.check` knows the digest.
    theirs = None if model.kind == "own" else _vocabulary(model)
    if theirs is not None and theirs != vocabulary.digest:
        raise UserError(
            f"a teacher with another vocabulary: the tokens of {what} are not those of "
            f"{vocabulary.name} (digest {theirs[:12]}, here {vocabulary.digest[:12]}); choose a "
            "teacher of the same vocabulary"
        )
    if theirs is None and model.kind != "own":
        say(
            f"{what} does not say which vocabulary it has; it has {rows} ids as the student, and "
            "is taken to mean the same by them"
        )


def _words(which: dict[str, Any]) -> str:
    step = "" if which.get("step") is None else f" of step {which['step']}"
    digest = "" if which.get("digest") is None else f", digest {which['digest'][:12]}"
    return f"{which.get('kind')}{step}{digest}"


def _recorded(run_dir: Path) -> dict[str, Any]:
    path = run_dir / FILE
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); use another --run_dir") from None


# ---- Reading what is there -------------------------------------------------------------------


def within(model: TeacherModel, run_dir: Path) -> TeacherModel:
    """The model of a run's own teacher, once the run directory is known."""
    return dataclasses.replace(model, path=run_dir / FOLDER) if model.kind == "own" else model


def _computed_as(config: TrainConfig, model: TeacherModel) -> TeacherModel:
    """The same model, computed in the way of the student."""
    student = config.model
    how = {name: getattr(student, name) for name in (
        "stack", "scan_unroll", "loss", "loss_chunk", "attention", "max_documents"
    )}
    if model.kind == "hugging_face":
        how["dtype"] = student.dtype
    return dataclasses.replace(model, model=dataclasses.replace(model.model, remat="none", **how))


@functools.lru_cache(maxsize=8)
def _opened(folder: str) -> TeacherCache:
    return open_teacher_cache(folder)


@functools.lru_cache(maxsize=8)
def _of_run(path: str, step: int | None) -> TeacherModel:
    run_dir = open_path(path)
    config = read_config(run_dir)
    with _checkpoints(run_dir, config) as checkpoints:
        steps = consensus.from_first(checkpoints.steps())
        if not steps:
            raise UserError(f"the teacher {path} holds no checkpoint yet")
        if step not in (None, *steps):
            raise UserError(
                f"the teacher {path} holds no checkpoint of step {step}; it has "
                f"{', '.join(map(str, steps))}"
            )
        step = steps[-1] if step is None else step
        refuse_open_ramp(config, step, "learn from")
        meta = checkpoints.read_meta(step)
    depth, taken = int(meta["depth"]), tuple(meta.get("decisions") or ())
    plan = decided_plan(config.plan(), taken)
    stage = plan.stages[plan.stage_at(max(step - 1, 0))]
    if stage.depth != depth:  # Grown on disk, and not trained since.
        stage = Stage(depth, stage.steps, stage.start)
    return TeacherModel("run", run_dir, step, config.model, stage, config, taken)


@functools.lru_cache(maxsize=8)
def _of_folder(path: str) -> TeacherModel:
    from stacking_jax.interop import hugging_face

    folder = hugging_face.read(path)
    model = hugging_face.decoder_config(folder)
    return TeacherModel("hugging_face", Path(path), None, model, Stage(folder.depth, 1, 0))


@functools.lru_cache(maxsize=8)
def _digest(path: str, step: int | None) -> str:
    """Of the files that hold the parameters; without a step, of a Hugging Face folder."""
    if step is not None:
        folder = open_path(path) / "checkpoints" / str(step)
        try:
            return manifest.digest(folder)
        except (OSError, ValueError) as error:
            raise UserError(
                f"the manifest of the teacher's checkpoint {folder} cannot be read ({error}): it "
                "tells this teacher from another"
            ) from None
    files = sorted([*Path(path).glob("*.safetensors"), Path(path) / "config.json"])
    said = "".join(f"{file.name}:{file_sha256(file)}\n" for file in files)
    return hashlib.sha256(said.encode()).hexdigest()


def _vocabulary(model: TeacherModel) -> str | None:
    """The digest of a teacher's vocabulary; None where it does not say."""
    if model.run is not None and model.run.data.has_own_vocabulary:
        data = model.run.data
        try:
            return load_tokenizer(data.vocabulary, data.extra_ids).info.digest
        except UserError:
            return None  # As of an imported run, whose tokenizer is of a kind of its own.
    if model.run is not None:
        return None
    folder = model.path
    settings = folder / "tokenizer_config.json"
    try:
        about = json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{settings} cannot be read ({error})") from None
    if about.get("tokenizer_class") == "ByT5Tokenizer":
        return Bytes(about.get("extra_ids", 125)).info.digest
    for name in ("spiece.model", "tokenizer.model"):
        if (folder / name).exists():
            extra = about.get("extra_ids", 0) if name == "spiece.model" else 0
            return load_tokenizer(str(folder / name), extra).info.digest
    return None


def _checkpoints(run_dir: Path, config: TrainConfig) -> contextlib.closing[Checkpoints]:
    return contextlib.closing(
        Checkpoints(run_dir / "checkpoints", read_only=True, digests=config.checkpoint_digests)
    )
