"""Which tensors of a layer write into the residual stream, and which make its scores.

How a copy starts depends on what a tensor is for: a copy whose output projections
are zero adds nothing to the stream, so the function is unchanged. Names differ from
codebase to codebase; a `Tensors` declares them, and `PRESETS` holds the common ones.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Iterable, Mapping

from stacking_jax.errors import UserError

Name = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A share of a fused tensor, such as the queries and keys of a fused projection.

    Attributes:
      pattern: which tensors, as in `Tensors`.
      start, stop: the share, as fractions of the axis.
      axis: the axis of one layer's tensor that is cut, counted from its end; None
        for the longest one, which is the fused one where the input has model width.
    """

    pattern: str
    start: float
    stop: float
    axis: int | None = None

    def span(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(axis, first, last + 1) within a layer's tensor of that shape.

        Raises:
          UserError: if the tensor has no such axis.
        """
        axis = self.axis if self.axis is not None else shape.index(max(shape)) - len(shape)
        if not -len(shape) <= axis < 0:
            raise UserError(f"{self.pattern!r} has shape {shape}: there is no axis {axis} to cut")
        size = shape[axis]
        return axis, round(self.start * size), round(self.stop * size)


@dataclasses.dataclass(frozen=True)
class Tensors:
    """What the tensors of a layer are for.

    A pattern is '/'-joined keys, matched as a contiguous run anywhere in the name of
    a tensor within its layer; each key may hold wildcards (`*`, `?`, `[ab]`); with a
    leading '/' it is matched at the layer's own level only. A pattern that names a
    module stands for all its tensors, biases included.

    Attributes:
      outputs: by branch, the patterns of whatever is added to the residual stream.
        Every branch must be found, or a start that silences them would not.
      queries_keys: what makes the attention scores.
    """

    outputs: Mapping[str, tuple[str, ...]]
    queries_keys: tuple[str | Part, ...] = ()


PRESETS: dict[str, Tensors] = {
    # stacking_jax.models.Decoder.
    "decoder": Tensors(
        outputs={"attention": ("attention/out",), "MLP": ("mlp/down",)},
        queries_keys=("attention/query", "attention/key"),
    ),
    # t5x/examples/{t5,scalable_t5}/network.py: encoder and decoder alike.
    "t5x": Tensors(
        outputs={"attention": ("*attention/out",), "MLP": ("mlp/wo",)},
        queries_keys=("*attention/query", "*attention/key"),
    ),
    # MaxText's checkpoint_conversion/utils/param_mapping.py: Llama, Gemma 2 and 3 (local
    # and global halves), Mixtral, DeepSeek, Qwen 3, GPT-OSS.
    "maxtext": Tensors(
        outputs={
            "attention": ("*attention*/out",),
            "MLP": (
                "mlp*/wo", "*[Mm]o[Ee]*/wo", "*experts/wo", "GptOssMlp/wo", "GptOssMlp/wo_bias",
            ),
        },
        queries_keys=("*attention*/query", "*attention*/key"),
    ),
    # google-deepmind/gemma, google/flax examples/gemma, big_vision's gemma. The norms
    # after the branches keep zero at zero.
    "gemma": Tensors(
        outputs={
            "attention": ("attn/attn_vec_einsum",), "MLP": ("mlp/linear", "mlp/down_proj")
        },
        queries_keys=(
            "attn/q_einsum",
            Part("attn/kv_einsum", 0, 1 / 2, axis=-4),
            Part("attn/qkv_einsum", 0, 2 / 3, axis=-4),
        ),
    ),
    # GPT-2's own names, as Hugging Face and nanoGPT descendants keep them.
    "gpt2": Tensors(
        outputs={"attention": ("attn/c_proj",), "MLP": ("mlp/c_proj",)},
        queries_keys=(Part("attn/c_attn", 0, 2 / 3),),
    ),
    # Hugging Face (Llama, Mistral, Qwen, SmolLM; Mixtral's experts) and EasyLM.
    "llama": Tensors(
        outputs={
            "attention": ("self_attn/o_proj", "attention/wo"),
            "MLP": ("mlp/down_proj", "mlp/experts/*/down_proj", "mlp/shared_expert/down_proj",
                    "feed_forward/w2", "block_sparse_moe/experts/*/w2"),
        },
        queries_keys=(
            "self_attn/q_proj", "self_attn/k_proj", "attention/wq", "attention/wk",
        ),
    ),
    # big_vision, scenic and Linen's own attention; Hugging Face's Flax ViT.
    "vit": Tensors(
        outputs={
            "attention": ("*Attention_*/out", "attention/output/dense"),
            "MLP": ("Mlp*_*/Dense_1", "/output/dense"),
        },
        queries_keys=(
            "*Attention_*/query", "*Attention_*/key",
            "attention/attention/query", "attention/attention/key",
        ),
    ),
}

_BRANCH = re.compile(r"att(entio)?n|mlp|ffn|feed_?forward|mo?e_?block|moe", re.IGNORECASE)
_NO_BRANCH = re.compile(r"norm|(^|_)ln|bias|dropout|gate$", re.IGNORECASE)


def matches(name: Name, pattern: str) -> bool:
    """Whether a tensor of that name within its layer falls under the pattern."""
    # Some trees join a module's keys with dots ('self_attn.o_proj.weight').
    keys = [part for key in name for part in key.split(".")]
    run = [key for key in pattern.split("/") if key]
    starts = [0] if pattern.startswith("/") else range(len(keys) - len(run) + 1)
    return any(
        len(keys) >= start + len(run)
        and all(map(fnmatch.fnmatchcase, keys[start : start + len(run)], run))
        for start in starts
    )


def resolve(tensors: Tensors | str | None, names: Iterable[Name]) -> Tensors:
    """The declaration for a stack whose layers hold tensors of these names.

    Args:
      tensors: a declaration, the name of a preset, or None to find the preset.
      names: the tensors of a layer.

    Raises:
      UserError: if there is no preset of that name, or none fits, or those that fit
        disagree.
    """
    names = sorted(set(names))
    if isinstance(tensors, Tensors):
        return tensors
    if tensors is not None:
        if tensors not in PRESETS:
            raise UserError(
                f"there is no preset {tensors!r} for the outputs of a layer; choose from "
                f"{', '.join(PRESETS)} or give Tensors(outputs=...)"
            )
        return PRESETS[tensors]
    fits = {
        preset: frozenset(output_names(declared, names))
        for preset, declared in PRESETS.items()
        if all(any(matches(n, p) for n in names for p in ps) for ps in declared.outputs.values())
        and not uncovered(declared, names)
    }
    if not fits:
        raise UserError(
            f"no preset knows the outputs of a layer with {_show(names)}; say which they are, "
            "as in outputs=Tensors(outputs={'attention': ('attn/out',), 'MLP': ('mlp/down',)})"
        )
    if len(set(fits.values())) > 1:
        raise UserError(
            f"the presets {', '.join(fits)} disagree about the outputs of a layer with "
            f"{_show(names)}; name one with outputs=..."
        )
    return PRESETS[next(iter(fits))]


def output_names(tensors: Tensors, names: Iterable[Name]) -> list[Name]:
    """The tensors that write into the residual stream."""
    patterns = [pattern for group in tensors.outputs.values() for pattern in group]
    return [name for name in names if any(matches(name, pattern) for pattern in patterns)]


def check_outputs(tensors: Tensors, names: Iterable[Name]) -> None:
    """Refuses a declaration under which some branch would go on writing.

    Raises:
      UserError: naming the branch and what the layer holds.
    """
    names = sorted(set(names))
    for branch, patterns in tensors.outputs.items():
        if not any(matches(name, pattern) for name in names for pattern in patterns):
            raise UserError(
                f"no tensor of a layer matches the {branch} outputs {', '.join(patterns)}; "
                f"the layer holds {_show(names)}"
            )
    missed = uncovered(tensors, names)
    if missed:
        raise UserError(
            f"{'/'.join(missed[0])} looks like a branch of its own, but none of its tensors is "
            "declared as an output; name it in outputs=Tensors(outputs=...)"
        )


def uncovered(tensors: Tensors, names: Iterable[Name]) -> list[Name]:
    """Modules that look like attention or an MLP and hold no declared output."""
    names = list(names)
    outputs = output_names(tensors, names)
    modules = set()
    for name in names:
        for at, key in enumerate(name[:-1]):
            if _BRANCH.search(key) and not _NO_BRANCH.search(key):
                modules.add(name[: at + 1])
                break
    return sorted(
        module for module in modules if not any(out[: len(module)] == module for out in outputs)
    )


def _show(names: list[Name]) -> str:
    shown = ", ".join("/".join(name) for name in names[:6])
    return f"{shown}, ... ({len(names)} tensors)" if len(names) > 6 else shown
