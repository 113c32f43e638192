"""The loss over a large vocabulary: memory and speed against logits that lie there whole.

    python -m benchmarks.head_memory --out benchmarks/results/head_memory_cpu.json

Value and gradient in hidden states and head, alone, without a model. The opponent makes the
logits `[B, L, V]` in float32 and hands them to Optax.
"""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax

from benchmarks.measure import report, speed, windows
from benchmarks.suite import NotYet


def measure(
    vocab: int, width: int, rows: int, length: int, dtype: str, count: int, steps: int
) -> dict:
    """Compiles, compares and times both.

    Raises:
      NotYet: this checkout has no chunked loss.
      AssertionError: they disagree.
    """
    try:
        from stacking_jax.models.head_loss import chunk_of, head_loss
    except ImportError as error:
        raise NotYet("stacking_jax.models.head_loss, the chunked loss") from error
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (rows, length, width)).astype(dtype)
    head = (jax.random.normal(keys[1], (vocab, width)) * width**-0.5).astype(dtype)
    targets = jax.random.randint(keys[2], (rows, length), 0, vocab)
    weights = jnp.ones((rows, length), jnp.float32)
    chunk = chunk_of("chunked", None, (rows, length), vocab)

    def chunked(hidden, head):
        return head_loss(hidden, head, targets, weights, vocab_axis=0, chunk=chunk)[0]

    def whole(hidden, head):
        logits = jnp.einsum("bld,vd->blv", hidden, head, preferred_element_type=jnp.float32)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, targets))

    programs, memory = {}, {}
    for name, loss in (("chunked", chunked), ("whole", whole)):
        programs[name] = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head).compile()
        memory[name] = programs[name].memory_analysis().temp_size_in_bytes
    one, other = (jax.tree.leaves(run(hidden, head)) for run in programs.values())
    close = 1e-4 if dtype == "float32" else 2e-2
    apart = [
        float(jnp.linalg.norm(_wide(a) - _wide(b)) / jnp.linalg.norm(_wide(b)))
        for a, b in zip(one, other, strict=True)
    ]
    assert max(apart) <= close, f"the losses or their gradients differ: {apart}"

    def timed(run):
        def times(steps: int) -> float:
            began = time.perf_counter()
            for _ in range(steps):
                last = run(hidden, head)
            jax.block_until_ready(last)
            return time.perf_counter() - began

        return times

    del one, other
    seconds = windows({name: timed(run) for name, run in programs.items()}, count, steps)
    return {
        "shape": {"vocab": vocab, "width": width, "rows": rows, "length": length, "dtype": dtype},
        "chunk": chunk,
        "largest_relative_differences": dict(
            zip(("value", "hidden", "head"), apart, strict=True)
        ),
        "temporary_bytes": memory,
        "memory": memory["chunked"] / memory["whole"],
        "median_seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "seconds": seconds,
        "speed": speed(seconds["whole"], seconds["chunked"]),
    }


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).reshape(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="in a window")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    found = measure(
        arguments.vocab, arguments.width, arguments.rows, arguments.length, arguments.dtype,
        arguments.windows, arguments.steps,
    )
    report("head_memory", found, arguments.out)


if __name__ == "__main__":
    main()
