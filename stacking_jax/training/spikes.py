"""Loss spikes: how a step is found to be one, and what is done about it.

The window of norms is part of the train state, so that what a resumed run finds is what the
uninterrupted one found. With no policy it is None, and the step is the same program as
without this file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from stacking_jax.console import warn
from stacking_jax.errors import UserError
from stacking_jax.training.mesh import LogicalMesh
from stacking_jax.training.spike_config import SpikeConfig
from stacking_jax.training.state import TrainState


class Rewind(Exception):
    """The run is to go back to its last checkpoint of the schedule before `step`.

    Attributes:
      step: the spike.
      history: of the run until then, with the spike in it.
      skipped_batches: batches that had been left out before, in all.
    """

    def __init__(self, step: int, history: list[dict[str, Any]], skipped_batches: int):
        super().__init__(f"spike at step {step}")
        self.step, self.history, self.skipped_batches = step, history, skipped_batches


# ---- Inside the step -------------------------------------------------------------------------


def judge(
    config: SpikeConfig, window: dict[str, jax.Array], norm: jax.Array
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Whether a step is a spike, by the norm of its gradient.

    Args:
      config: the rule.
      window: `norms`, float32 `[window]`, of the steps that were none, in a ring; and
        `count`, int32, how many there have been.
      norm: float32 scalar.

    Returns:
      Whether it is one (bool), the median that it was held against (0 while the window
      is not full), and the window after it. A norm that is not finite is no spike, nor
      does it enter the window.
    """
    norms, count = window["norms"], window["count"]
    full = count >= config.window
    median = jnp.where(full, jnp.median(norms), 0.0)
    spike = full & jnp.isfinite(norm) & (norm > config.factor * median)
    accepted = jnp.isfinite(norm) & ~spike
    entered = norms.at[count % config.window].set(norm)
    return spike, median, {
        "norms": jnp.where(accepted, entered, norms),
        "count": count + accepted.astype(count.dtype),
    }


def with_window(abstract: TrainState, config: SpikeConfig, mesh: LogicalMesh) -> TrainState:
    """An abstract state with the window that the policy needs: the same on every device."""
    if config.action is None:
        return abstract
    whole = mesh.sharding(())
    window = {
        "norms": jax.ShapeDtypeStruct((config.window,), jnp.float32, sharding=whole),
        "count": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    }
    return dataclasses.replace(abstract, spikes=window)


def without_window(state: TrainState) -> TrainState:
    return dataclasses.replace(state, spikes=None)


def empty_window(state: TrainState, abstract: TrainState) -> TrainState:
    """The state with an empty window: at the beginning, and after a growth.

    A grown network has gradients of another size. Held against the old ones, all its
    steps might be spikes for ever, since a spike does not enter the window.
    """
    if abstract.spikes is None:
        return state
    make = jax.jit(
        lambda: zeros_of_window(abstract.spikes),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract.spikes),
    )
    return dataclasses.replace(state, spikes=make())


def zeros_of_window(window: Any) -> Any:
    """The empty window like an abstract one; None for None."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), window)


# ---- On the host -----------------------------------------------------------------------------


class SpikeWatch:
    """Records spikes in the run's history, and decides how it goes on.

    Attributes:
      skipped_batches: batches that rewinding has left out so far. The batch of step s,
        counted from 1, is number s - 1 + skipped_batches.
    """

    def __init__(self, config: SpikeConfig, history: list[dict[str, Any]], skipped_batches: int):
        """Watches a run with this history, to which it adds."""
        self._config, self._history = config, history
        self.skipped_batches = skipped_batches

    def seen(self, step: int, norm: float, median: float) -> dict[str, Any]:
        """Takes note of a spike.

        Returns:
          What was recorded.

        Raises:
          Rewind: if that is the policy.
          UserError: if there have been too many.
        """
        config = self._config
        about = {"action": config.action, "grad_norm": norm, "median": median}
        self._history.append({"step": step, "event": "spike", **about})
        recent = [
            entry for entry in self._history
            if entry.get("event") == "spike" and entry["step"] > step - config.limit_steps
        ]
        if len(recent) > config.limit:
            raise UserError(
                f"{len(recent)} loss spikes within {config.limit_steps} steps, the last at step "
                f"{step} with a gradient norm of {norm:.4g} against a median of {median:.4g}; "
                "lower the learning rate, or raise SpikeConfig.limit and run the same command again"
            )
        warn(
            f"spike at step {step}: gradient norm {norm:.4g}, median {median:.4g}; "
            + ("the step is left out" if config.action == "skip" else "going back")
        )
        if config.action == "rewind":
            raise Rewind(step, self._history, self.skipped_batches)
        return about


def grown_on_disk(history: list[dict[str, Any]], step: int) -> bool:
    """Whether the checkpoint of `step` was grown after it had been made."""
    return bool(history) and "to_depth" in history[-1] and history[-1]["step"] == step


def taken_up(
    rewind: Rewind | None, step: int, history: list[dict[str, Any]], skipped_batches: int
) -> tuple[list[dict[str, Any]], int]:
    """History and left-out batches with which a run goes on from its checkpoint of `step`.

    Args:
      rewind: why it goes back there, or None where it goes on.
      step: of the checkpoint; 0 for the beginning.
      history, skipped_batches: as the checkpoint has them.
    """
    if rewind is None:
        return history, skipped_batches
    # Growths after the checkpoint will happen again; spikes after it have happened.
    spikes = [entry for entry in rewind.history if entry.get("event") == "spike"]
    history = history + [entry for entry in spikes if entry not in history]
    return history, rewind.skipped_batches + rewind.step - step


def rewind_target(spike_step: int, checkpoint_every: int, steps: list[int]) -> int:
    """The checkpoint to go back to, or 0 for the beginning.

    The newest of the schedule before the spike, whatever else was saved in between: a run
    that was stopped on the way must go the way of one that was not.

    Args:
      spike_step: of the spike.
      checkpoint_every: the schedule.
      steps: of the checkpoints that are there.
    """
    before = [step for step in steps if step < spike_step]
    scheduled = [step for step in before if step % checkpoint_every == 0]
    return max(scheduled or before, default=0)
