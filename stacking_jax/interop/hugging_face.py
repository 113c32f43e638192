"""Folders of Hugging Face's Llama family: configuration, names and shapes.

Read are Llama (SmolLM and SmolLM2 among them), Mistral, Qwen2, Qwen3 and
SmolLM3. All keep a layer's tensors under `model.layers.{i}.` with the same
names, which is all that growing needs. Our decoder can hold those of them that
compute what it computes: `decoder_config` refuses the others with the reason.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stacking_jax.console import warn
from stacking_jax.errors import UserError
from stacking_jax.growth import DepthMap
from stacking_jax.interop.tensor_files import Tensor, read_folder, read_json
from stacking_jax.models import DecoderConfig

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
"""Architecture -> model_type."""

PER_LAYER_LISTS = ("layer_types", "no_rope_layers")
"""Entries of a configuration that hold one value per layer."""

_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")
_WEIGHTS = re.compile(
    r".*\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json|pt|pth|gguf|h5|msgpack|onnx)"
)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder, checked.

    Attributes:
      path: of the folder.
      values: what config.json holds.
      family: a model_type of `FAMILIES`.
      depth: layers.
      layers: for each layer, the rest of a tensor's name -> the tensor.
      others: the tensors outside the layers, by name.
    """

    path: Path
    values: Mapping[str, Any]
    family: str
    depth: int
    layers: tuple[Mapping[str, Tensor], ...]
    others: Mapping[str, Tensor]


def read(path: str | Path) -> Folder:
    """Reads config.json and the headers of the tensors; no values yet.

    Raises:
      UserError: if a file is missing or damaged, the architecture is unknown, or
        tensors and configuration do not fit together.
    """
    path = Path(path)
    values = read_json(path / "config.json")
    family = _family(path, values)
    depth = _whole(path, values, "num_hidden_layers")
    tensors = read_folder(path)
    layers: dict[int, dict[str, Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        if found := _LAYER.fullmatch(name):
            layers.setdefault(int(found[1]), {})[found[2]] = tensor
        else:
            others[name] = tensor
    for number in range(max([depth, *(layer + 1 for layer in layers)])):
        if (number in layers) != (number < depth):
            raise UserError(
                f"{path} holds {'the' if number in layers else 'no'} tensors "
                f"model.layers.{number}.*, but config.json says num_hidden_layers = {depth}"
            )
    folder = Folder(path, values, family, depth, tuple(layers[i] for i in range(depth)), others)
    _check_tensors(folder)
    return folder


def is_folder(path: str | Path) -> bool:
    """Whether `path` looks like a Hugging Face folder, by its config.json."""
    config = Path(path) / "config.json"
    if not config.is_file():
        return False
    values = read_json(config)
    return "architectures" in values or "model_type" in values


def grown_config(folder: Folder, depth_map: DepthMap) -> dict[str, Any]:
    """config.json of the grown model: the depth, and whatever it lists per layer."""
    values, depth = dict(folder.values), folder.depth
    first_sliding = values.get("max_window_layers")
    if isinstance(first_sliding, int):
        # Qwen: layers from this one on attend to a window, where windows are used at all.
        # A grown stack need not have them at its end, so each layer is named.
        if values.get("use_sliding_window") and not values.get("layer_types"):
            values["layer_types"] = [
                "full_attention" if layer < first_sliding else "sliding_attention"
                for layer in range(depth)
            ]
        values["max_window_layers"] = (
            first_sliding - depth + len(depth_map) if first_sliding >= depth
            else sum(source < first_sliding for source in depth_map.sources)
        )
    if folder.family == "smollm3" and values.get("no_rope_layers") is None:
        every = values.get("no_rope_layer_interval", 4)
        values["no_rope_layers"] = [int((layer + 1) % every != 0) for layer in range(depth)]
    for name in PER_LAYER_LISTS:
        entries = values.get(name)
        if isinstance(entries, list):
            if len(entries) != depth:
                raise UserError(
                    f"{folder.path / 'config.json'}: {name} has {len(entries)} entries for "
                    f"{depth} layers"
                )
            values[name] = [entries[source] for source in depth_map.sources]
    return values | {"num_hidden_layers": len(depth_map)}


def copy_other_files(source: Path, target: Path) -> None:
    """Copies everything but weights and config.json: tokenizer, generation settings."""
    for entry in sorted(source.iterdir()):
        if entry.is_file() and entry.name != "config.json" and not _WEIGHTS.fullmatch(entry.name):
            shutil.copyfile(entry, target / entry.name)


def decoder_config(folder: Folder) -> DecoderConfig:
    """The shape of our decoder that computes what the folder's model computes.

    Raises:
      UserError: if our decoder has no part for something in the model.
    """
    values, where = folder.values, folder.path / "config.json"

    def refuse(what: str) -> UserError:
        return UserError(f"{where}: our decoder has no {what}; this model can be grown with "
                         "`stacking-jax grow` but not imported")

    if folder.family == "qwen2":
        raise refuse("biases on queries, keys and values, which Qwen2 has")
    if folder.family == "qwen3":
        raise refuse("norms on queries and keys, which Qwen3 has")
    if folder.family == "smollm3":
        raise refuse("layers without rotary positions, which SmolLM3 has")
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise refuse(f"biases ({name} = true)")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise refuse(f"activation {values['hidden_act']!r} in its gated MLP, only silu")
    window = values.get("sliding_window")
    if window is not None:
        warn(
            f"{where}: attention reaches {window} tokens back there and all the way in our "
            "decoder; texts that are longer give other logits"
        )
    d_model = _whole(folder.path, values, "hidden_size")
    heads = _whole(folder.path, values, "num_attention_heads")
    head_dim = values.get("head_dim")
    return DecoderConfig(
        vocab_size=_whole(folder.path, values, "vocab_size"),
        num_layers=folder.depth,
        d_model=d_model,
        d_ff=_whole(folder.path, values, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads"),
        head_dim=None if head_dim is None or head_dim * heads == d_model else head_dim,
        tied_embeddings=_tied(values),
        rope_theta=_rope_theta(where, values, refuse),
        norm_epsilon=float(values.get("rms_norm_eps", 1e-6)),
    )


def config_values(
    config: DecoderConfig, depth: int, *, dtype: str, max_positions: int, eos_id: int | None
) -> dict[str, Any]:
    """config.json of our decoder with `depth` layers, as `LlamaForCausalLM`."""
    if config.d_model % config.num_heads:
        warn(
            f"transformers refuses a Llama whose {config.num_heads} heads do not divide its width "
            f"of {config.d_model}, though head_dim is given; others may read it"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": config.norm_epsilon,
        # transformers 4 reads the first, 5 the second; they say the same.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": config.d_model**-0.5,
        "use_cache": True,
        # In training, every document begins with id 0, which is padding elsewhere.
        "bos_token_id": 0,
        "eos_token_id": eos_id,
        "pad_token_id": 0,
        "torch_dtype": dtype,
    }


def _family(path: Path, values: Mapping[str, Any]) -> str:
    architectures = values.get("architectures") or []
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    model_type = values.get("model_type")
    family = FAMILIES.get(named) if named else model_type
    if family not in FAMILIES.values():
        raise UserError(
            f"{path / 'config.json'}: the architecture {named or model_type!r} is not known; "
            f"known are {', '.join(FAMILIES)}"
        )
    return family


def _check_tensors(folder: Folder) -> None:
    """Raises UserError unless every expected tensor is there, in its shape, in every layer."""
    outside, layer = _expected(folder)
    for name, shape in outside.items():
        if name not in folder.others:
            raise UserError(
                f"{folder.path} holds no tensor {name}, which its config.json calls for"
            )
        _check_shape(folder.others[name], shape)
    first = folder.layers[0]
    for number, tensors in enumerate(folder.layers):
        for rest in sorted({*layer, *first, *tensors}):
            name = f"model.layers.{number}.{rest}"
            if rest not in tensors:
                raise UserError(f"{folder.path} holds no tensor {name}, which the model needs")
            if rest not in first:
                raise UserError(f"{folder.path} holds the tensor {name}, but none such in layer 0")
            _check_shape(tensors[rest], layer.get(rest, first[rest].shape))


def _check_shape(tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise UserError(
            f"{tensor.source}: tensor {tensor.name} has shape {list(tensor.shape)}, but its "
            f"configuration calls for {list(expected)}"
        )


def _expected(folder: Folder) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes by name: outside the layers, and within one layer."""
    path, values = folder.path, folder.values
    stream = _whole(path, values, "hidden_size")
    inner = _whole(path, values, "intermediate_size")
    vocabulary = _whole(path, values, "vocab_size")
    heads = _whole(path, values, "num_attention_heads")
    kv_heads = values.get("num_key_value_heads")
    kv_heads = heads if kv_heads is None else _whole(path, values, "num_key_value_heads")
    # Qwen3's own default, which does not follow from the other sizes.
    width = 128 if folder.family == "qwen3" else stream // heads
    if values.get("head_dim") is not None:
        width = _whole(path, values, "head_dim")
    outside = {
        "model.embed_tokens.weight": (vocabulary, stream),
        "model.norm.weight": (stream,),
    }
    if not _tied(values):
        outside["lm_head.weight"] = (vocabulary, stream)
    matrices = {
        "self_attn.q_proj": (heads * width, stream),
        "self_attn.k_proj": (kv_heads * width, stream),
        "self_attn.v_proj": (kv_heads * width, stream),
        "self_attn.o_proj": (stream, heads * width),
        "mlp.gate_proj": (inner, stream),
        "mlp.up_proj": (inner, stream),
        "mlp.down_proj": (stream, inner),
    }
    layer = {f"{name}.weight": shape for name, shape in matrices.items()}
    layer |= {"input_layernorm.weight": (stream,), "post_attention_layernorm.weight": (stream,)}
    biased = [name for name in matrices if _has_bias(folder, name)]
    layer |= {f"{name}.bias": matrices[name][:1] for name in biased}
    if folder.family == "qwen3":
        layer |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
    return outside, layer


def _has_bias(folder: Folder, name: str) -> bool:
    if folder.family == "qwen2":
        return name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    if folder.family == "mistral":
        return False
    key = "attention_bias" if name.startswith("self_attn") else "mlp_bias"
    return bool(folder.values.get(key, False))


def _tied(values: Mapping[str, Any]) -> bool:
    # What the configuration classes of this family take where the key is left out; SmolLM3's
    # says otherwise.
    return bool(values.get("tie_word_embeddings", values.get("model_type") == "smollm3"))


def _rope_theta(where: Path, values: Mapping[str, Any], refuse) -> float:
    """The base of the rotary positions, written the old way or the new way."""
    parameters = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise UserError(f"{where}: rope_parameters and rope_scaling must be objects")
    for entry in (parameters, scaling):
        kind = entry.get("rope_type", entry.get("type", "default"))
        if kind != "default":
            raise refuse(f"scaled rotary positions (rope_type = {kind!r})")
    if parameters.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)) != 1.0:
        raise refuse("rotary positions on a part of each head")
    theta = parameters.get("rope_theta", values.get("rope_theta", 10_000.0))
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise UserError(f"{where}: rope_theta must be a number; got {theta!r}")
    return float(theta)


def _whole(path: Path, values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"{path / 'config.json'}: {name} must be a positive whole number; got {value!r}"
        )
    return value
