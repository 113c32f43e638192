"""A Hugging Face folder of the Llama family as a run of ours."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stacking_jax.console import say
from stacking_jax.data import DataConfig
from stacking_jax.errors import UserError
from stacking_jax.interop import hugging_face, llama_names, runs, stored_state
from stacking_jax.interop.folders import byte_progress, new_folder
from stacking_jax.interop.run_files import first_meta, write_run_files
from stacking_jax.interop.tensor_files import Tensor, read_json
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.models.config import HOW_COMPUTED
from stacking_jax.training import manifest
from stacking_jax.training.checkpoints import as_stored
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import initial_state

_FREE = ("dtype", "num_layers", *HOW_COMPUTED)
"""Settings of our decoder that no Hugging Face folder decides."""


def import_params(source: str | Path) -> tuple[dict[str, Any], DecoderConfig]:
    """The parameters of a Hugging Face folder, in memory.

    Args:
      source: folder of a model of the Llama family.

    Returns:
      Nested dicts of float32 NumPy arrays, layers on axis 0, and the decoder's shape.

    Raises:
      UserError: if the folder is damaged, or our decoder cannot compute its model.
    """
    folder = hugging_face.read(source)
    config = hugging_face.decoder_config(folder)
    params: dict[str, Any] = {}
    for path, name in llama_names.outside(config).items():
        _put(params, path, _values(path, folder.others[name]))
    for path, rest in llama_names.LAYER.items():
        layers = [_values(path, layer[rest]) for layer in folder.layers]
        _put(params, (*llama_names.STACK, *path), np.stack(layers))
    return params, config


def import_folder(
    source: str | Path,
    out: str | Path,
    *,
    config: TrainConfig | None = None,
    data_digest: str | None = None,
) -> None:
    """Makes a run directory whose checkpoint 0 holds the model of a Hugging Face folder.

    It can be sampled from, grown and exported. With `config` it is the beginning
    of that run: `train` goes on from it, with a fresh optimiser.

    Args:
      source: folder of a model of the Llama family.
      out: the new run directory; it appears whole or not at all.
      config: of the run that is to begin here; its model must be that of the
        folder, and the depth of its first stage the folder's. None makes one up.
      data_digest: of the data of `config`, which `train` compares.

    Raises:
      UserError: if the folder is damaged, our decoder cannot compute its model,
        the model is not that of `config`, or something is at `out`.
    """
    folder = hugging_face.read(source)
    model = hugging_face.decoder_config(folder)
    _check_names(folder, model)
    out = Path(out).absolute()
    if config is None:
        config = TrainConfig(model=model, data=_data(folder, out / runs.FOREIGN))
    else:
        _check_model(folder, model, config)
    make_optimizer = optimizer(config.optimizer, LAYOUT)
    abstract = jax.eval_shape(
        lambda: initial_state(config.model, make_optimizer, folder.depth, seed=0)
    )
    tree = as_stored(abstract)
    with new_folder(out) as temporary:
        (temporary / "checkpoints").mkdir()
        state = stored_state.create(temporary / "checkpoints" / "0", tree, first_meta(config))
        _write_state(state, folder, model)
        manifest.write(temporary / "checkpoints" / "0", digests=config.checkpoint_digests)
        write_run_files(temporary, config, data_digest)
        kept = temporary / runs.FOREIGN
        kept.mkdir()
        hugging_face.copy_other_files(folder.path, kept)
        shutil.copyfile(folder.path / "config.json", kept / "config.json")


def _write_state(
    state: stored_state.StoredState, folder: hugging_face.Folder, model: DecoderConfig
) -> None:
    writer = stored_state.Writer()
    total = sum(
        stored_state.nbytes(leaf) for keys, leaf in state.shapes().items() if keys[0] == "params"
    )
    with byte_progress("importing", total) as advance:

        def write(path: llama_names.Path, tensor: Tensor, region) -> None:
            values = _values(path, tensor)
            writer.write(region, values)
            advance(values.nbytes)

        for path, name in llama_names.outside(model).items():
            write(path, folder.others[name], state.open(("params", *path), write=True))
            writer.finish()
        for path, rest in llama_names.LAYER.items():
            stack = state.open(("params", *llama_names.STACK, *path), write=True)
            for number, layer in enumerate(folder.layers):
                write(path, layer[rest], stack[number])
            writer.finish()
        for keys in state.shapes():
            # What every optimiser of ours begins with; a test holds them to it.
            if keys[0] != "params":
                writer.zeros(state.open(keys, write=True))
                writer.finish()


def _values(path: llama_names.Path, tensor: Tensor) -> np.ndarray:
    """A tensor in our layout, as float32."""
    values = tensor.read()
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise UserError(f"{tensor.source}: tensor {tensor.name} holds {tensor.dtype}, no floats")
    values = values.T if llama_names.is_transposed(path) else values
    return np.ascontiguousarray(values, dtype=np.float32)


def _put(tree: dict[str, Any], path: llama_names.Path, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _check_names(folder: hugging_face.Folder, model: DecoderConfig) -> None:
    """Raises UserError for a tensor that would be left out."""
    # The angles that old Llama files hold follow from rope_theta, and a head beside tied
    # embeddings is one that `transformers` does not read either.
    known = {*llama_names.OUTSIDE.values(), *llama_names.LAYER.values()}
    known.add("self_attn.rotary_emb.inv_freq")
    for name in (*folder.others, *(rest for layer in folder.layers for rest in layer)):
        if name not in known:
            raise UserError(
                f"{folder.path} holds the tensor {name}, for which our decoder has no place; this "
                "model can be grown with `stacking-jax grow` but not imported"
            )


def _check_model(folder: hugging_face.Folder, model: DecoderConfig, config: TrainConfig) -> None:
    wanted = {"head_width": model.head_width, "kv_heads": model.kv_heads}
    given = {"head_width": config.model.head_width, "kv_heads": config.model.kv_heads}
    for field in dataclasses.fields(DecoderConfig):
        if field.name not in (*_FREE, "head_dim", "num_kv_heads"):
            wanted[field.name] = getattr(model, field.name)
            given[field.name] = getattr(config.model, field.name)
    differing = [
        f"{name}: {given[name]!r}, there {wanted[name]!r}"
        for name in wanted
        if not (wanted[name] == given[name] or _is_close(wanted[name], given[name]))
    ]
    if differing:
        raise UserError(f"the model of {folder.path} is another: {'; '.join(differing)}")
    first = config.plan().stages[0].depth
    if first != folder.depth:
        raise UserError(
            f"{folder.path} has {folder.depth} layers, but the run begins with {first}"
        )


def _is_close(a: Any, b: Any) -> bool:
    # 1e-6 written in two ways.
    return isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-12)


def _data(folder: hugging_face.Folder, kept: Path) -> DataConfig:
    """The vocabulary of the folder, where it is one that our data can have."""
    length = folder.values.get("max_position_embeddings")
    length = length if isinstance(length, int) and length > 1 else 2048
    settings = folder.path / "tokenizer_config.json"
    described = read_json(settings) if settings.exists() else {}
    if described.get("tokenizer_class") == "ByT5Tokenizer":
        extra = described.get("extra_ids", 125)
        return DataConfig(vocabulary="bytes", extra_ids=extra, sequence_length=length)
    for name in ("spiece.model", "tokenizer.model"):
        if (folder.path / name).exists():
            extra = described.get("extra_ids", 0) if name == "spiece.model" else 0
            return DataConfig(
                vocabulary=str(kept / name), extra_ids=extra, sequence_length=length
            )
    say(
        f"{folder.path} has no vocabulary that our data can use (bytes or SentencePiece): the "
        "model can be grown, exported and computed with, but `generate` cannot read a prompt"
    )
    # Named all the same: bytes would be another vocabulary, in silence.
    return DataConfig(vocabulary=str(kept / "tokenizer.json"), sequence_length=length)
