"""Attention kernels on the accelerator at hand: are they right, do they leak, how fast are they.

    python -m benchmarks.gpu_attention --out benchmarks/results/gpu_attention.json

Every kernel is checked against XLA's attention in float32 (values, gradients, packed documents,
prompts that see themselves whole, and what one document knows of another: exactly nothing),
then timed, forward and backward, taking turns. Packed rows are set beside rows of one document.
On a machine without an accelerator it checks a small shape, kernels in Pallas's interpreter, and
times that for nothing but to see that it can.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import interleaved, ratio, report
from stacking_jax.errors import UserError
from stacking_jax.models import DecoderConfig, triton
from stacking_jax.models.kernels import attention_mask, interpreted, self_attention

FIRST = 7
"""The tokens of the first document in the leak test: it ends within a block."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows, tokens of a row, query heads, key heads, the width of one, documents of a row."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    width: int
    documents: int


SHAPES = {
    "gpt2_124m": Shape(32, 1024, 12, 12, 64, 4),
    "gpt2_124m_short": Shape(32, 1024, 12, 12, 64, 16),
    "1b_width_64": Shape(16, 1280, 32, 32, 64, 4),
    "1b_width_128": Shape(16, 1280, 16, 16, 128, 4),
    "1b_grouped": Shape(16, 1280, 16, 4, 128, 4),
    "long": Shape(4, 8192, 16, 16, 128, 8),
}
SMALL = {"small": Shape(2, 192, 4, 2, 16, 3)}

BLOCKS = {
    "triton_32": dict.fromkeys(triton.BLOCKS, 32) | {"block_q": 128, "block_k": 128},
    "triton_128": dict.fromkeys(triton.BLOCKS, 64) | {
        "block_q": 128, "block_k": 128, "block_q_dkv": 128, "block_q_dq": 128,
        "block_kv_dkv": 128, "block_kv_dq": 128,
    },
    "triton_64": dict.fromkeys(triton.BLOCKS, 64),
}
"""Blocks of the Triton kernel to be timed beside its own."""


def segments_of(shape: Shape, seed: int = 0) -> np.ndarray:
    """Documents of random lengths and padding behind them, int32 `[rows, length]`."""
    dice = np.random.default_rng(seed)
    rows = []
    for _ in range(shape.rows):
        inner = np.arange(FIRST + 1, shape.length - 1)
        ends = np.sort(dice.choice(inner, shape.documents - 1, replace=False))
        ends = np.array([FIRST, *ends, shape.length])
        ids = [*range(1, shape.documents + 1), 0]
        rows.append(np.repeat(ids, np.diff(ends, prepend=0)))
    return np.array(rows, np.int32)


def prompts_of(segments: np.ndarray) -> np.ndarray:
    """The first third of each document, bool."""
    prompts = np.zeros(segments.shape, bool)
    for row, ids in zip(prompts, segments, strict=True):
        for number in range(1, ids.max() + 1):
            places = np.flatnonzero(ids == number)
            row[places[: len(places) // 3]] = True
    return prompts


def arrays(shape: Shape) -> list[jax.Array]:
    """Query, key, value and a cotangent, in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    return [
        jax.random.normal(key, (shape.rows, shape.length, count, shape.width), jnp.bfloat16)
        for key, count in zip(keys, heads, strict=True)
    ]


def program(kernel: str, shape: Shape, *, limit: int | None, prompts: bool, dtype="bfloat16"):
    """(query, key, value, cotangent, segments, prompts) -> output and three gradients, jitted."""
    config = DecoderConfig(
        vocab_size=2, num_layers=1, d_model=2, d_ff=1, num_heads=shape.heads,
        num_kv_heads=shape.kv_heads, head_dim=shape.width, dtype=dtype, attention=kernel,
        max_documents=limit,
    )

    def run(query, key, value, cotangent, segments, bidirectional):
        mask = attention_mask(
            config, segments.shape, segments, bidirectional if prompts else None
        )
        out, pull = jax.vjp(lambda *x: self_attention(*x, mask), query, key, value)
        # As in a decoder: rows of which the kernel would be wrong are not numbers.
        return mask.guard(out.reshape(*out.shape[:2], -1)).reshape(out.shape), pull(cotangent)

    return jax.jit(run)


def check(kernel: str, shape: Shape, prompts: bool) -> dict:
    """Errors against float32, and what leaks; raises UserError if the kernel cannot run."""
    segments = segments_of(shape)
    rest = jnp.asarray(segments), jnp.asarray(prompts_of(segments))
    query, key, value, cotangent = arrays(shape)
    run = program(kernel, shape, limit=shape.documents, prompts=prompts)
    got = jax.tree.leaves(run(query, key, value, cotangent, *rest))
    with jax.default_matmul_precision("highest"):
        wide = [x.astype(jnp.float32) for x in (query, key, value, cotangent)]
        exact = program("xla", shape, limit=None, prompts=prompts, dtype="float32")
        want = jax.tree.leaves(exact(*wide, *rest))
    plain = program("xla", shape, limit=None, prompts=prompts)
    near = jax.tree.leaves(plain(query, key, value, cotangent, *rest))

    def error(mine):
        return [
            float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))
            for a, b in zip(mine, want, strict=True)
        ]

    # Another first document changes no bit of the others, and no gradient reaches it.
    def other(x):
        return x.at[:, :FIRST].multiply(-3)

    again = run(other(query), other(key), other(value), cotangent, *rest)[0]
    leaked = float(jnp.max(jnp.abs((again - got[0])[:, FIRST:].astype(jnp.float32))))
    _, gradients = run(query, key, value, cotangent.at[:, :FIRST].set(0), *rest)
    leaked_back = max(
        float(jnp.max(jnp.abs(leaf[:, :FIRST].astype(jnp.float32)))) for leaf in gradients
    )
    errors, of_xla = error(got), error(near)
    names = ("output", "query", "key", "value")
    return {
        "error": dict(zip(names, errors, strict=True)),
        "error_of_xla_in_bfloat16": dict(zip(names, of_xla, strict=True)),
        "leak": leaked, "leak_of_gradients": leaked_back,
        # NaN is no agreement either.
        "right": all(a <= 2 * b + 1e-3 for a, b in zip(errors, of_xla, strict=True))
        and leaked == leaked_back == 0,
    }


@contextlib.contextmanager
def blocks(sizes: dict[str, int] | None):
    """Programs that are traced within have these blocks."""
    kept = dict(triton.BLOCKS)
    triton.BLOCKS.update(sizes or {})
    try:
        yield
    finally:
        triton.BLOCKS.update(kept)


def contenders(shape: Shape, prompts: bool):
    """Name -> (compiled program, its arguments); names of those that cannot run -> why."""
    packed = segments_of(shape)
    whole = np.ones_like(packed)
    n = shape.documents
    asked = {
        "cudnn_one_document": ("cudnn", 1, whole, None),
        "cudnn_packed": ("cudnn", n, packed, None),
        "cudnn_packed_32": ("cudnn", max(32, n), packed, None),
        "cudnn_packed_128": ("cudnn", 128, packed, None),
        "cudnn_packed_layout_of_one": ("cudnn", 2, whole, None),
        "triton_packed": ("triton", None, packed, None),
        "triton_one_document": ("triton", None, whole, None),
        "xla_packed": ("xla", None, packed, None),
    } | {name: ("triton", None, packed, sizes) for name, sizes in BLOCKS.items()}
    found, refused = {}, {}
    for name, (kernel, limit, segments, sizes) in asked.items():
        rest = jnp.asarray(segments), jnp.asarray(prompts_of(segments))
        given = (*arrays(shape), *rest)
        try:
            with blocks(sizes):
                run = program(kernel, shape, limit=limit, prompts=prompts)
                found[name] = run.lower(*given).compile(), given
        except UserError as error:
            refused[name] = str(error)
        except Exception as error:  # noqa: BLE001: a variant that does not fit the card
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return found, refused


def timed(shape: Shape, prompts: bool, rounds: int, calls: int) -> dict:
    """Seconds of one forward and backward pass, and speeds against rows of one document."""
    found, refused = contenders(shape, prompts)

    def runner(compiled, given):
        def run():
            for _ in range(calls):
                result = compiled(*given)
            jax.block_until_ready(result)

        return run

    seconds = interleaved({name: runner(*pair) for name, pair in found.items()}, rounds)
    seconds = {name: [one / calls for one in all_] for name, all_ in seconds.items()}
    reference = seconds.get("cudnn_one_document")
    return {
        "shape": dataclasses.asdict(shape), "prompts": prompts,
        "median_seconds": {name: statistics.median(one) for name, one in seconds.items()},
        "temporary_bytes": {
            name: compiled.memory_analysis().temp_size_in_bytes
            for name, (compiled, _) in found.items()
        },
        "speed_against_cudnn_one_document": None if reference is None else {
            name: ratio(reference, one) for name, one in seconds.items()
        },
        "refused": refused,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=10, help="passes in one timed window")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    here = jax.default_backend() == "cpu"
    shapes = SMALL if here else SHAPES
    shapes = {name: shapes[name] for name in arguments.shapes or shapes}
    checks, times = {}, {}
    with interpreted() if here else contextlib.nullcontext():
        for name, shape in shapes.items():
            small = dataclasses.replace(shape, rows=2)
            for kernel in ("cudnn", "triton"):
                for prompts in (False, True):
                    label = f"{name}/{kernel}/{'prompts' if prompts else 'causal'}"
                    try:
                        checks[label] = check(kernel, small, prompts)
                    except UserError as error:
                        checks[label] = {"refused": str(error)}
            for prompts in (False, True):
                label = f"{name}/{'prompts' if prompts else 'causal'}"
                times[label] = timed(shape, prompts, arguments.rounds, arguments.calls)
    wrong = [name for name, one in checks.items() if "refused" not in one and not one["right"]]
    report(
        "gpu_attention",
        {
            "device": jax.devices()[0].device_kind, "all_right": not wrong, "wrong": wrong,
            "goal": {"packed against one document": 0.97, "leak": 0},
            "checks": checks, "times": times,
        },
        arguments.out,
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
