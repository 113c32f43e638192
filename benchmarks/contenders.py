"""Train steps that are timed side by side: ours, one by hand in JAX, and torch's.

All begin with the same weights, see the same batches in the same order and use the same
optimiser with the same constants; `agree` compares what they then compute, before any of them
is timed. A contender called with a number of steps runs them and returns the seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import plain_step
from stacking_jax.data import DataConfig
from stacking_jax.growth.layouts import path_keys
from stacking_jax.interop import llama_names
from stacking_jax.models import LAYOUT, DecoderConfig
from stacking_jax.training import MeshConfig, OptimizerConfig, TrainConfig, sharding
from stacking_jax.training.optimizers import optimizer as make_optimizer
from stacking_jax.training.programs import lower_train_step
from stacking_jax.training.state import TrainState, abstract_state, initial_state, model_graph

BATCHES = 4
"""Different batches, which come again and again."""

CHECKED_STEPS = 4
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (5e-3, 3e-2)}
"""Relative, of losses and of the first gradient's norm, by the dtype of the computation."""

OPTIMIZER = OptimizerConfig(
    peak_learning_rate=1e-4, schedule="constant", warmup_fraction=0.0, weight_decay=0.1
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder and its batch.

    Attributes:
      vocab, layers, width, inner, heads: of the decoder; the head is tied.
      rows, length: of a batch.
      dtype: of the computation; weights and moments are float32 everywhere.
      documents: in each row; more than one needs a packed mask.
    """

    vocab: int
    layers: int
    width: int
    inner: int
    heads: int
    rows: int
    length: int
    dtype: str = "bfloat16"
    documents: int = 1

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def config(self, **settings: Any) -> TrainConfig:
        """The run of this shape, with more settings of the decoder."""
        return TrainConfig(
            model=DecoderConfig(
                vocab_size=self.vocab, num_layers=self.layers, d_model=self.width,
                d_ff=self.inner, num_heads=self.heads, dtype=self.dtype, **settings,
            ),
            data=DataConfig(sequence_length=self.length),
            optimizer=OPTIMIZER,
            batch_size=self.rows,
        )

    def flops_per_step(self) -> float:
        """Model FLOPs of a step: head and attention in full, no recomputation counted."""
        costs = self.config().model.costs(self.length)
        return self.tokens * costs.flops_per_token(self.layers)

    def batch(self, number: int) -> dict[str, np.ndarray]:
        """Random tokens; documents of equal length."""
        ends = [self.length * i // self.documents for i in range(self.documents + 1)]
        lengths = np.diff(ends)
        segments = np.repeat(np.arange(1, self.documents + 1, dtype=np.int32), lengths)
        positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        random = np.random.default_rng(number)
        return {
            "tokens": random.integers(3, self.vocab, (self.rows, self.length), dtype=np.int32),
            "segment_ids": np.tile(segments, (self.rows, 1)),
            "positions": np.tile(positions, (self.rows, 1)),
        }


def initial_params(shape: Shape) -> Any:
    """Fresh parameters, on the device, with sharper attention and louder branches.

    At its first values a decoder's loss hardly depends on its layers: wrong attention would
    go unseen. Twice the weights make it depend on them.
    """
    louder = {"query", "key", "out", "down"}
    optimizer = make_optimizer(OPTIMIZER, LAYOUT)

    def make(key):
        params = initial_state(shape.config().model, optimizer, shape.layers, key).params
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: 2 * leaf if path[-1].key in louder else leaf, params
        )

    return jax.jit(make)(jax.random.key(0))


class Jitted:
    """A contender that is a jitted JAX step."""

    def __init__(self, step: Callable, state: Any, place: Callable, shape: Shape):
        self._step, self._state, self._place = step, state, place
        self._batches = [shape.batch(number) for number in range(BATCHES)]
        self._next = 0

    def first(self, steps: int = CHECKED_STEPS) -> dict[str, list[float]]:
        """Runs steps and gives what each computed."""
        seen: dict[str, list[float]] = {"loss": [], "grad_norm": []}
        for _ in range(steps):
            metrics = self._one()
            for name, values in seen.items():
                values.append(float(metrics[name]))
        return seen

    def __call__(self, steps: int) -> float:
        jax.block_until_ready(self._state)
        began = time.perf_counter()
        for _ in range(steps):
            self._one()
        jax.block_until_ready(self._state)
        return time.perf_counter() - began

    def _one(self):
        batch = self._place(self._batches[self._next % BATCHES])
        self._next += 1
        self._state, metrics = self._step(self._state, batch)
        return metrics


def ours(shape: Shape, params: Any, **settings: Any) -> Jitted:
    """The train step as a run compiles it, on one device.

    Args:
      shape: of model and batch.
      params: initial parameters, which are copied.
      **settings: of the decoder.
    """
    config = shape.config(**settings)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, LAYOUT)
    abstract = abstract_state(config.model, optimizer, shape.layers, mesh)
    step = lowered(shape, **settings).compile()
    begin = jax.jit(
        lambda params: TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params)),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    )
    state = begin(jax.tree.map(jnp.copy, params))
    return Jitted(step, state, lambda batch: sharding.place_batch(batch, mesh), shape)


def lowered(shape: Shape, **settings: Any) -> jax.stages.Lowered:
    """The train step as a run compiles it, on one device, traced and not compiled."""
    config = shape.config(**settings)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, LAYOUT)
    abstract = abstract_state(config.model, optimizer, shape.layers, mesh)
    plan, graph = config.plan(), model_graph(config.model)
    return lower_train_step(config, plan, plan.stages[0], graph, optimizer, mesh, abstract)


def plain(
    shape: Shape, params: Any, *, kernel: str | None = None, stacked: bool = False
) -> Jitted:
    """The step written by hand; see `plain_step.make_step`.

    Args:
      shape: of model and batch; one document per row where there is a kernel.
      params: initial parameters, which are copied.
      kernel: of the attention.
      stacked: index stacked layers, rather than keep them in a list.
    """
    if kernel is not None and shape.documents > 1:
        raise ValueError("the kernel sees one document per row")
    params = jax.tree.map(jnp.copy, params)
    if not stacked:
        layers = params["stack"]["layers"]
        params["stack"] = {"layers": [
            jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(shape.layers)
        ]}
    matrices = lambda p: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: path[-1].key != "scale", p
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(OPTIMIZER.clip_norm),
        optax.adamw(
            OPTIMIZER.peak_learning_rate, OPTIMIZER.beta1, OPTIMIZER.beta2, OPTIMIZER.epsilon,
            weight_decay=OPTIMIZER.weight_decay, mask=matrices,
        ),
    )
    step = jax.jit(
        plain_step.make_step(
            optimizer, shape.heads, shape.layers, dtype=shape.dtype, kernel=kernel
        ),
        donate_argnums=0,
    )
    device = jax.devices()[0]
    state = params, jax.jit(optimizer.init)(params)
    return Jitted(step, state, lambda batch: jax.device_put(batch, device), shape)


class Torch:
    """A contender in torch, in a process of its own; see `torch_step`.

    Attributes:
      versions: of torch and, where it is used, transformers.
      device: as torch names it.
    """

    def __init__(
        self, shape: Shape, params: Any, *, kind: str = "gpt", compiled: bool, device: str,
        threads: int | None = None,
    ):
        """Starts it and waits until the first steps have been run.

        Args:
          shape: of model and batch, one document per row.
          params: initial parameters.
          kind: 'gpt', written in the manner of nanoGPT, or 'llama', of transformers.
          compiled: by torch.compile, else eager.
          device: 'cuda' or 'cpu'.
          threads: of torch on a CPU; None for as many as it likes.

        Raises:
          RuntimeError: if torch cannot be had or fails, with its last lines.
        """
        if shape.documents > 1:
            raise ValueError("torch's causal attention sees one document per row")
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        _write_tensors(folder / "params.npz", params)
        for number in range(BATCHES):
            np.save(folder / f"tokens_{number}.npy", shape.batch(number)["tokens"])
        settings = {
            "shape": dataclasses.asdict(shape), "kind": kind, "compiled": compiled,
            "device": device, "threads": threads, "batches": BATCHES,
            "checked_steps": CHECKED_STEPS, "optimizer": dataclasses.asdict(OPTIMIZER),
        }
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        self._errors = (folder / "errors.txt").open("w+", encoding="utf-8")
        beside = os.pathsep.join([f"{sys.prefix}/parity", os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.torch_step", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            env=os.environ | {
                "PYTHONPATH": beside, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
            },
        )
        self._first = self._answer()
        self.versions, self.device = self._first["versions"], self._first["device"]

    def first(self) -> dict[str, list[float]]:
        return {name: self._first[name] for name in ("loss", "grad_norm")}

    def __call__(self, steps: int) -> float:
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._errors.close()
        self._folder.cleanup()

    def _answer(self) -> dict:
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self._errors.seek(0)
        last = self._errors.read().strip().splitlines()[-6:]
        raise RuntimeError("torch ended: " + " | ".join(last))


def agree(
    shape: Shape, one: dict[str, Sequence[float]], other: dict[str, Sequence[float]]
) -> dict[str, float]:
    """Whether two contenders compute the same, from what their first steps gave.

    Returns:
      The largest relative differences of the losses and of the first gradient's norm.

    Raises:
      AssertionError: if they are larger than the dtype explains.
    """
    of_loss, of_norm = TOLERANCES[shape.dtype]
    apart = [np.abs(np.array(one[name]) / np.array(other[name]) - 1) for name in one]
    found = {"loss": float(apart[0].max()), "grad_norm": float(apart[1][0])}
    if not (found["loss"] <= of_loss and found["grad_norm"] <= of_norm):
        raise AssertionError(f"they compute different things: {found}; {one} against {other}")
    return found


def _write_tensors(path: Path, params: Any) -> None:
    """Parameters under the names of `LlamaForCausalLM`, as float32 in an .npz file."""
    tensors = {}
    for where, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        keys, values = path_keys(where), np.asarray(leaf)
        turn = (lambda a: a.T) if llama_names.is_transposed(keys) else (lambda a: a)
        if keys in llama_names.OUTSIDE:
            tensors[llama_names.OUTSIDE[keys]] = turn(values)
            continue
        rest = llama_names.LAYER[keys[len(llama_names.STACK) :]]
        for number, layer in enumerate(values):
            tensors[llama_names.layer_tensor(number, rest)] = turn(layer)
    np.savez(path, **tensors)
