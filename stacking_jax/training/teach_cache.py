"""Runs a teacher over the packed training records and keeps its most probable tokens.

What is written lies in a hidden folder until all is there; a killed one is gone on with, a
shard at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from stacking_jax import console
from stacking_jax.data import MixedCache, PackedBatches, PackedCache, open_cache
from stacking_jax.data.manifest import Shard
from stacking_jax.data.split_writer import file_sha256, open_shard
from stacking_jax.data.teacher_cache import (
    FILE,
    FLOATS,
    PassInfo,
    TeacherCache,
    TeacherManifest,
    encode_labels,
    open_teacher_cache,
    shards_of,
)
from stacking_jax.data.teacher_scores import record_scores
from stacking_jax.errors import UserError
from stacking_jax.models.head_loss import chunk_of
from stacking_jax.models.losses import carries_loss
from stacking_jax.models.soft_targets import top_log_probs
from stacking_jax.training import sharding, teacher
from stacking_jax.training.compilation import use_compilation_cache
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.programs import abstract_batch
from stacking_jax.training.setup import check_vocabulary
from stacking_jax.training.stack_runs import hidden_of_batch
from stacking_jax.training.state import model_graph

PROGRESS = "progress.json"


def make_teacher_cache(
    config: TrainConfig, folder: str | Path, dtype: str = "float32"
) -> TeacherCache:
    """Writes the labels and the scores of all training records of a run.

    Of UL2, whose passes differ, those passes that the run's taught steps read.

    Args:
      config: of the run; `config.distill` names the teacher, `top_k` and `select_k`.
      folder: where they are to lie; a complete one is opened and held against the above.
      dtype: of the log-probabilities, 'float32' or 'float16'.

    Raises:
      UserError: there is no teacher, or it has another vocabulary; the folder holds something
        else.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"distill-cache runs in one process, not in {jax.process_count()}: start it on one "
            "host, without --distributed and --coordinator; all read what it writes"
        )
    folder = Path(folder).expanduser().absolute()
    distill = config.distill
    if distill.teacher is None or distill.top_k is None:
        raise UserError(
            "name the teacher and how many tokens to keep: bind DistillConfig.teacher and "
            "DistillConfig.top_k"
        )
    if dtype not in FLOATS:
        raise UserError(f"--dtype is one of {', '.join(FLOATS)}; got {dtype!r}")
    # The teacher does not depend on how long it teaches.
    on = dataclasses.replace(distill, fraction=distill.fraction or 1.0)
    config = dataclasses.replace(config, distill=on)
    use_compilation_cache(config.compilation_cache)
    cache = open_cache(config.data)
    check_vocabulary(config, cache)
    teacher.check_vocabulary(config, cache.manifest.vocabulary)
    begun = _describe(config, cache, dtype)
    if folder.exists() and any(folder.iterdir()):
        return _the_same(folder, begun)
    wanted = list(_wanted(config, cache, distill.fraction))
    building = folder.parent / f".{folder.name}.building"
    building.mkdir(parents=True, exist_ok=True)
    done = _done(building, begun)
    label = _label_program(config)
    passes = []
    total = sum(source.num_records("train") for _, _, source in wanted)
    with console.progress("asking the teacher", total, "records") as advance:
        for name, number, source in wanted:
            # Numbered too: names that differ in signs alone would share their files.
            place = list(cache.sources).index(name)
            clean = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)
            stem = f"{place:02d}-{clean}-pass-{number:03d}"
            shards, scores = _one_pass(config, begun, building, done, label, stem, source, advance)
            np.save(building / f"{stem}.scores.npy", scores)
            info = source.manifest.splits["train"]
            passes.append(
                PassInfo(
                    name, number, info.records, info.digest, shards, f"{stem}.scores.npy",
                    file_sha256(building / f"{stem}.scores.npy"),
                )
            )
    manifest = dataclasses.replace(begun, passes=tuple(passes), digest="")
    for kept in done.values():
        (building / kept["scores"]).unlink()
    (building / PROGRESS).unlink(missing_ok=True)
    manifest.save(building)
    if folder.exists():
        folder.rmdir()
    os.rename(building, folder)
    return open_teacher_cache(folder)


def _describe(
    config: TrainConfig, cache: PackedCache | MixedCache, dtype: str
) -> TeacherManifest:
    """The manifest before there is anything in it."""
    model, distill = teacher.find(config), config.distill
    return TeacherManifest(
        teacher={
            "source": str(model.path), "params": model.params, **teacher.identity(config),
        },
        vocabulary=cache.manifest.vocabulary.digest,
        vocab_size=model.model.vocab_size,
        sequence_length=config.data.sequence_length,
        top_k=distill.top_k,
        dtype=dtype,
        select_k=distill.select_k,
        forward_flops=model.forward_flops(config.data.sequence_length),
        training_flops=model.training_flops(),
        passes=(),
    )


def _the_same(folder: Path, begun: TeacherManifest) -> TeacherCache:
    if not (folder / FILE).exists():
        raise UserError(f"{folder} is not empty and holds no labels; name another folder")
    there = open_teacher_cache(folder)
    for field in dataclasses.fields(TeacherManifest):
        if field.name in ("passes", "digest"):
            continue
        old, new = getattr(there.manifest, field.name), getattr(begun, field.name)
        if field.name == "teacher":
            old, new = old["digest"], new["digest"]
        if old != new:
            raise UserError(
                f"{folder} was made differently ({field.name}: {old} there, {new} asked for); "
                "name another folder"
            )
    console.say(f"{folder} is already complete; nothing is left to do")
    return there


def _wanted(
    config: TrainConfig, cache: PackedCache | MixedCache, fraction: float
) -> Iterator[tuple[str, int, PackedCache]]:
    """(source, pass, its cache) of all that taught steps read."""
    times = dict.fromkeys(cache.sources, 1.0)
    if fraction:
        data = PackedBatches(
            cache, batch_size=config.batch_size, seed=config.seed,
            total_steps=config.total_steps,
        )
        times = data.passes(config.distill.steps(config.total_steps))
    share = config.distill.select or 1.0
    for name, source in cache.sources.items():
        # Of a part of the records, a pass lasts so much shorter.
        passes = max(math.ceil(times[name] / share), 1) if source.varies else 1
        for number in range(passes):
            yield name, number, source.train_pass(number)


def _one_pass(
    config: TrainConfig, begun: TeacherManifest, folder: Path, done: dict[str, Any],
    label: Callable[[dict], tuple[np.ndarray, np.ndarray]], stem: str, source: PackedCache,
    advance: Callable[[int], None],
) -> tuple[tuple[Shard, ...], np.ndarray]:
    """Writes the labels of a pass; returns its shards and the scores of its records."""
    room = config.data.sequence_length * (
        4 * begun.top_k + FLOATS[begun.dtype].itemsize * (begun.top_k + 1)
    )
    data = PackedBatches(source, "train", batch_size=1, shuffle=False)
    shards, scores = [], []
    for part, records in enumerate(shards_of(source.num_records("train"), room)):
        file, beside = f"{stem}-{part:05d}.array_record", f"{stem}-{part:05d}.scores.npy"
        kept = done.get(file)
        if kept is None or not _is_there(folder, kept):
            some = _one_shard(config, begun, folder / file, data, label, records, advance)
            np.save(folder / beside, some)
            kept = {
                "shard": dataclasses.asdict(
                    Shard(file, len(records), (folder / file).stat().st_size,
                          file_sha256(folder / file))
                ),
                "scores": beside, "scores_sha256": file_sha256(folder / beside),
            }
            done[file] = kept
            _write(folder, begun, done)
        else:
            advance(len(records))
        shards.append(Shard(**kept["shard"]))
        scores.append(np.load(folder / kept["scores"]))
    return tuple(shards), np.concatenate(scores)


def _one_shard(config, begun, path, data, label, records, advance) -> np.ndarray:
    """Writes a shard; returns the scores of its records."""
    writer, scores, size = open_shard(path), [], config.batch_size
    k = max(begun.top_k, begun.select_k)
    for start in range(records.start, records.stop, size):
        numbers = list(range(start, min(start + size, records.stop)))
        rows = [data.batch(number) for number in numbers]
        rows += [{name: np.zeros_like(row) for name, row in rows[0].items()}] * (size - len(rows))
        batch = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        ids, log_probs = label(batch)
        counted = np.asarray(carries_loss(batch))
        top = slice(None, begun.select_k)
        scores.append(
            record_scores(
                batch["tokens"], counted, ids[..., top], log_probs[..., :k][..., top]
            )[: len(numbers)]
        )
        if k > begun.top_k:
            tail = np.logaddexp.reduce(log_probs[..., begun.top_k :], axis=-1, keepdims=True)
            log_probs = np.concatenate([log_probs[..., : begun.top_k], tail], axis=-1)
        for row in range(len(numbers)):
            real = int((batch["segment_ids"][row] > 0).sum())
            writer.write(
                encode_labels(
                    ids[row, :real, : begun.top_k], log_probs[row, :real], begun.vocab_size,
                    begun.dtype,
                )
            )
        advance(len(numbers))
    writer.close()
    return np.concatenate(scores)


def _label_program(config: TrainConfig) -> Callable[[dict], tuple[np.ndarray, np.ndarray]]:
    """From a batch to the teacher's ids and log-probabilities; what is compiled runs it."""
    model = teacher.find(config)
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(mesh, config.batch_size, 1, config.data.sequence_length)
    constrain, graph = sharding.constrainer(mesh), model_graph(model.model)
    k = min(max(config.distill.top_k, config.distill.select_k), model.model.vocab_size)
    shape = model.model

    def label(params, batch):
        decoder = nnx.merge(graph, params)
        hidden = hidden_of_batch(decoder, batch, model.stack(0), constrain)
        kernel, vocab_axis = decoder.head_matrix()
        chunk = chunk_of(
            shape.loss, shape.loss_chunk, hidden.shape[:2], shape.vocab_size, constrain
        )
        return top_log_probs(
            hidden, kernel, vocab_axis=vocab_axis, k=k, chunk=chunk, constrain=constrain
        )

    params, programs = model.load(mesh), {}

    def run(batch: dict) -> tuple[np.ndarray, np.ndarray]:
        keys = tuple(batch)
        if keys not in programs:
            abstract = abstract_batch(config, mesh, keys)
            programs[keys] = jax.jit(label).lower(params, abstract).compile()
        return jax.device_get(programs[keys](params, sharding.place_batch(batch, mesh)))

    return run


# ---- What a killed attempt has left ----------------------------------------------------------


def _key(begun: TeacherManifest) -> str:
    return hashlib.sha256(begun.digest.encode()).hexdigest()


def _done(folder: Path, begun: TeacherManifest) -> dict[str, Any]:
    """File -> what is known of it, of an attempt at the very same; else the folder is emptied."""
    path = folder / PROGRESS
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["key"] == _key(begun):
                console.say(f"going on with labels that were begun: {len(found['done'])} shards")
                return found["done"]
        except (OSError, ValueError, KeyError):
            pass
    for leftover in folder.iterdir():
        leftover.unlink()
    return {}


def _is_there(folder: Path, kept: dict[str, Any]) -> bool:
    files = {kept["shard"]["file"]: kept["shard"]["sha256"], kept["scores"]: kept["scores_sha256"]}
    return all(
        (folder / name).exists() and file_sha256(folder / name) == sha256
        for name, sha256 in files.items()
    )


def _write(folder: Path, begun: TeacherManifest, done: dict[str, Any]) -> None:
    unfinished = folder / f".{PROGRESS}.partial"
    unfinished.write_text(json.dumps({"key": _key(begun), "done": done}), encoding="utf-8")
    os.replace(unfinished, folder / PROGRESS)
