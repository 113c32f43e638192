"""How a step of a taught stage gets its soft targets: a live teacher's, or a cache's."""

from __future__ import annotations

import abc
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stacking_jax.data.teacher_cache import IDS_KEY, LOG_PROBS_KEY
from stacking_jax.growth import Stage
from stacking_jax.models.decoder import Constrain
from stacking_jax.models.head_loss import SoftTargets, Teacher, chunk_of
from stacking_jax.models.soft_targets import top_log_probs, top_targets
from stacking_jax.training import sharding
from stacking_jax.training.config import TrainConfig
from stacking_jax.training.stack_runs import hidden_of_batch
from stacking_jax.training.state import model_graph
from stacking_jax.training.teacher import TeacherModel, find, labels_of

LABELS = ("batch", "length", None)


class Teaching(abc.ABC):
    """What a taught step adds to a plain one."""

    def __init__(self, config: TrainConfig):
        self.config = config

    def weight(self, step: jax.Array) -> jax.Array | float:
        """ω after `step` updates."""
        distill = self.config.distill
        if not distill.anneal:
            return distill.weight
        steps = distill.steps(self.config.total_steps)
        return distill.weight * (1.0 - jnp.asarray(step, jnp.float32) / steps)

    @abc.abstractmethod
    def soft_targets(self, teacher: Any, batch: dict, constrain: Constrain) -> SoftTargets:
        """Of a batch, or of a microbatch.

        Args:
          teacher: the parameters that `arguments` describes.
          batch: as the step takes it.
          constrain: places activations on the mesh.
        """

    def arguments(self, mesh: sharding.LogicalMesh) -> tuple[Any, ...]:
        """What the step takes beside state and batch, abstract."""
        return ()

    def labels(self, mesh: sharding.LogicalMesh) -> dict[str, jax.ShapeDtypeStruct]:
        """What a batch holds beside the plain arrays, abstract."""
        return {}

    def _truncated(self, ids: jax.Array, log_probs: jax.Array) -> SoftTargets:
        distill = self.config.distill
        return top_targets(
            ids, log_probs, vocab=self.config.model.vocab_size,
            temperature=distill.temperature, tail=distill.tail,
        )


class Live(Teaching):
    """A teacher that runs forward in the step."""

    def __init__(self, config: TrainConfig, model: TeacherModel):
        super().__init__(config)
        self.model, self.graph = model, model_graph(model.model)

    def soft_targets(self, teacher, batch, constrain):
        model = nnx.merge(self.graph, jax.lax.stop_gradient(teacher))
        hidden = hidden_of_batch(model, batch, self.model.stack(0), constrain)
        kernel, vocab_axis = model.head_matrix()
        distill, shape = self.config.distill, model.config
        if distill.top_k is None:
            if distill.temperature != 1:
                hidden = (hidden / distill.temperature).astype(hidden.dtype)
            return Teacher(hidden, kernel if vocab_axis == 0 else kernel.T)
        chunk = chunk_of(
            shape.loss, shape.loss_chunk, hidden.shape[:2], shape.vocab_size, constrain
        )
        return self._truncated(
            *top_log_probs(
                hidden, kernel, vocab_axis=vocab_axis, k=distill.top_k, chunk=chunk,
                constrain=constrain,
            )
        )

    def arguments(self, mesh):
        return (self.model.abstract(mesh),)


class Cached(Teaching):
    """Labels that lie beside the records; no teacher runs."""

    def __init__(self, config: TrainConfig, top_k: int):
        super().__init__(config)
        self.top_k = top_k

    def soft_targets(self, teacher, batch, constrain):
        del teacher, constrain
        ids, log_probs = batch[IDS_KEY], batch[LOG_PROBS_KEY]
        k = self.config.distill.top_k or self.top_k
        if k < self.top_k:
            # What is cut off goes to the tail.
            tail = jax.nn.logsumexp(log_probs[..., k:], axis=-1, keepdims=True)
            ids, log_probs = ids[..., :k], jnp.concatenate([log_probs[..., :k], tail], axis=-1)
        return self._truncated(ids, log_probs)

    def labels(self, mesh):
        shape = (self.config.batch_size, self.config.data.sequence_length)
        where = mesh.sharding(LABELS)
        return {
            IDS_KEY: jax.ShapeDtypeStruct((*shape, self.top_k), jnp.int32, sharding=where),
            LOG_PROBS_KEY: jax.ShapeDtypeStruct(
                (*shape, self.top_k + 1), jnp.float32, sharding=where
            ),
        }


def teaching_of(config: TrainConfig, stage: Stage) -> Teaching | None:
    """How this stage is taught; None where it is not.

    Raises:
      UserError: if the teacher cannot be found.
    """
    if not stage.taught:
        return None
    labels = labels_of(config)
    if labels is not None:
        return Cached(config, labels.manifest.top_k)
    return Live(config, find(config))
