"""Continues text with the model of a run directory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from stacking_jax.data import mode_ids
from stacking_jax.data import tokenizer as open_tokenizer
from stacking_jax.errors import UserError
from stacking_jax.models.decoding import generate
from stacking_jax.paths import open_path
from stacking_jax.training import consensus, sharding
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.compilation import use_compilation_cache
from stacking_jax.training.growing import refuse_open_ramp
from stacking_jax.training.run_directory import read_config
from stacking_jax.training.stack_runs import stored_runs
from stacking_jax.training.state import abstract_params, model_graph


def sample_from_run(
    run_dir: str | Path,
    prompt: str,
    *,
    step: int | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    loops: int | None = None,
) -> list[str]:
    """Samples continuations of `prompt`; see `models.decoding.generate`.

    A looped model runs its block `loops` times; None for as often as in training.

    Raises:
      UserError: if the directory holds no run or no such checkpoint, or loops are asked for
        and it has none.
    """
    if num_samples < 1:
        raise UserError(f"num_samples must be at least 1; got {num_samples}")
    run_dir = open_path(run_dir)
    config = read_config(run_dir)
    use_compilation_cache(config.compilation_cache)
    tokenizer = open_tokenizer(config.data)
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(f"{run_dir} holds no checkpoint yet")
    checkpoints = Checkpoints(
        run_dir / "checkpoints", read_only=True, digests=config.checkpoint_digests
    )
    # Of a run that goes on, the newest is not the same for all who ask.
    steps = consensus.from_first(checkpoints.steps())
    if not steps:
        raise UserError(f"{run_dir} holds no checkpoint yet")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(
            f"{run_dir} holds no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
        )
    refuse_open_ramp(config, step, "generate with")
    mesh = sharding.make_decoding_mesh(config.mesh)
    params = checkpoints.restore_params(
        step, lambda depth: abstract_params(config.model, depth, mesh)
    )
    # Plain continuation, which UL2 trains behind its mode token and without a prompt.
    mode = [mode_ids(tokenizer.info)["causal"]] if config.data.has_mode_tokens else []
    shape = dataclasses.replace(config.model, bidirectional_prompts=False)
    # As many rows as the mesh divides; those that nobody asked for are not waited for.
    rows = -(-num_samples // mesh.parts("batch")) * mesh.parts("batch")
    outputs = generate(
        model_graph(shape), params, [mode + tokenizer.encode(prompt)] * rows,
        max_new_tokens=max_new_tokens, eos_id=tokenizer.eos_id, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed,
        stopped=lambda row, ids: row >= num_samples,
        place=lambda array: sharding.place(array, mesh, ("batch", *[None] * (array.ndim - 1))),
        constrain=sharding.constrainer(mesh),
        **stored_runs(checkpoints.read_meta(step), loops),
    )
    return [tokenizer.decode(tokens) for tokens in outputs[:num_samples]]
