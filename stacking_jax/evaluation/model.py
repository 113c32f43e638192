"""The model that is evaluated: parameters, tokens, context, devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stacking_jax.data import Tokenizer
from stacking_jax.data import tokenizer as open_tokenizer
from stacking_jax.data.ul2 import mode_ids
from stacking_jax.errors import UserError
from stacking_jax.evaluation.config import EvaluationConfig
from stacking_jax.evaluation.tokens import Split, split
from stacking_jax.growth import DepthMap, Loop
from stacking_jax.paths import open_path
from stacking_jax.training import consensus, sharding
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.compilation import use_compilation_cache
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.growing import refuse_open_ramp
from stacking_jax.training.mesh import LogicalMesh, make_decoding_mesh
from stacking_jax.training.run_directory import read_config
from stacking_jax.training.stack_runs import stored_runs
from stacking_jax.training.state import abstract_params, model_graph


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What scoring and generation need to know of a model.

    Attributes:
      graph: its graph definition; `nnx.merge(graph, params)` has `prefill` and `decode`.
      params: nested dicts.
      tokenizer: of its vocabulary.
      context: tokens it may see, the new ones included: the sequence length of its run.
      mesh: the devices, for decoding: all axes but `tensor` divide a batch.
      opening: ids before every prompt: UL2's mode token, if there is one.
      depth_map, loop: how its layers run; None and None for every layer once.
    """

    graph: Any
    params: Any
    tokenizer: Tokenizer
    context: int
    mesh: LogicalMesh
    opening: tuple[int, ...] = ()
    depth_map: DepthMap | None = None
    loop: Loop | None = None

    @property
    def runs(self) -> dict[str, Any]:
        """How its layers run, as arguments of whatever runs them."""
        return {"depth_map": self.depth_map, "loop": self.loop}

    def split(self, prompt: str, target: str) -> Split:
        """Prompt and target as tokens; see `tokens.split`."""
        parts = split(self.tokenizer, prompt, target)
        return dataclasses.replace(parts, prompt_ids=[*self.opening, *parts.prompt_ids])

    def local_rows(self, rows: int) -> tuple[int, ...]:
        """Those of a batch's rows that this host places."""
        return sharding.local_rows(rows, self.mesh)

    @property
    def parts(self) -> int:
        """Devices over which a batch is divided."""
        return self.mesh.parts("batch")

    @property
    def constrain(self):
        """Places activations on the mesh."""
        return sharding.constrainer(self.mesh)

    def place(self, array: np.ndarray) -> jax.Array:
        """Puts an array whose first axis is the batch onto the mesh."""
        return self.place_axis(array, 0)

    def place_axis(self, array: np.ndarray, axis: int) -> jax.Array:
        """Puts an array onto the mesh, divided along `axis`."""
        names = [None] * axis + ["batch"] + [None] * (array.ndim - axis - 1)
        return sharding.place(array, self.mesh, names)


class RunModels:
    """The checkpoints of a run as models.

    Attributes:
      run_dir, config: of the run.
      steps: of its checkpoints, oldest first.
    """

    def __init__(
        self, run_dir: str | Path, settings: EvaluationConfig = EvaluationConfig()
    ):
        """Opens a run to read it; another process may be training there.

        Args:
          run_dir: of the run.
          settings: how prompts are to be read.

        Raises:
          UserError: if the directory holds no run, or one without a checkpoint.
        """
        self.run_dir = open_path(run_dir)
        self.config: TrainConfig = read_config(self.run_dir)
        use_compilation_cache(self.config.compilation_cache)
        if not (self.run_dir / "checkpoints").is_dir():
            raise UserError(f"{run_dir} holds no checkpoint yet")
        self._checkpoints = Checkpoints(
            self.run_dir / "checkpoints", read_only=True, digests=self.config.checkpoint_digests
        )
        # A run may go on beside this one, and its newest step is not the same for all who ask.
        self.steps = consensus.from_first(self._checkpoints.steps())
        if not self.steps:
            raise UserError(f"{run_dir} holds no checkpoint yet")
        self._settings = settings
        self.mesh = make_decoding_mesh(self.config.mesh)
        self.tokenizer = open_tokenizer(self.config.data)

    def choose(self, step: int | None = None) -> int:
        """The step of a checkpoint: the newest, or the one asked for if it is there."""
        if step is None:
            return self.steps[-1]
        if step not in self.steps:
            raise UserError(
                f"{self.run_dir} holds no checkpoint of step {step}; it has "
                f"{', '.join(map(str, self.steps))}"
            )
        return step

    def load(self, step: int) -> LanguageModel:
        """The model of one checkpoint, straight into its shards.

        Raises:
          UserError: if it cannot be read, its copies are only half let in by gates, or loops are
            asked for and it has none.
        """
        refuse_open_ramp(self.config, step, "evaluate")
        params = self._checkpoints.restore_params(
            step, lambda depth: abstract_params(self.config.model, depth, self.mesh)
        )
        runs = stored_runs(self._checkpoints.read_meta(step), self._settings.loops)
        return language_model(
            self.config, params, self.tokenizer, self.mesh, self._settings, runs
        )

    def depth(self, step: int) -> int:
        """Layers of one checkpoint."""
        return int(self.meta(step)["depth"])

    def meta(self, step: int) -> dict[str, Any]:
        """What stands beside the state of one checkpoint: its plan, its history."""
        return self._checkpoints.read_meta(step)


def language_model(
    config: TrainConfig, params: Any, tokenizer: Tokenizer, mesh: LogicalMesh,
    settings: EvaluationConfig, runs: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """The model of a run, reading prompts as the settings say.

    `runs` is how its layers run, see `stack_runs.stored_runs`; None for every layer once.
    """
    shape = config.model
    if settings.bidirectional_prompts is not None:
        shape = dataclasses.replace(shape, bidirectional_prompts=settings.bidirectional_prompts)
    opening: tuple[int, ...] = ()
    if config.data.has_mode_tokens and settings.mode is not None:
        opening = (mode_ids(tokenizer.info)[settings.mode],)
    return LanguageModel(
        model_graph(shape), params, tokenizer, config.data.sequence_length, mesh, opening,
        **(runs or {}),
    )
