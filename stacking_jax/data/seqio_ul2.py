"""The UL2 objectives as seqio preprocessors, made from t5's.

For a seqio Task of one's own:

    seqio.TaskRegistry.add(
        "my_ul2", source=..., output_features={"inputs": feature, "targets": feature},
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos,
                       *seqio_ul2.preprocessors(1280)])

Texts and tasks with `targets` alone need none of this: `DataConfig.objective = 'ul2'`
does the same to them without TensorFlow, balances the shares exactly (here they hold
on average) and corrupts each pass anew (here the noise follows seqio's seed).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from stacking_jax.data.t5_modules import import_t5
from stacking_jax.data.tasks import FEATURE, PROMPT, describe_vocabulary, import_seqio
from stacking_jax.data.ul2 import Objectives, mode_ids
from stacking_jax.data.ul2_config import CAUSAL, OBJECTIVES, PREFIX, SPAN, UL2Config


def preprocessors(
    record_length: int, config: UL2Config = UL2Config(), *, mode_tokens: bool = True
) -> list[Callable[..., Any]]:
    """Tokenised `targets` to chunks, and these to `inputs` (the prompt) and `targets`.

    Args:
      record_length: tokens of a record; no chunk, corrupted, has more.
      config: shares and noise; its seed has no say here.
      mode_tokens: whether `inputs` begins with the token of the objective.
    """
    return [
        functools.partial(_split, record_length=record_length, config=config, modes=mode_tokens),
        functools.partial(_mix, config=config, modes=mode_tokens),
    ]


def preprocessor(objective: str, config: UL2Config = UL2Config(), *, mode_tokens: bool = True):
    """One objective alone, for chunks that are short enough."""
    only = {name: float(name == objective) for name in OBJECTIVES}
    return functools.partial(
        _mix, config=dataclasses.replace(config, **only), modes=mode_tokens
    )


def _split(dataset, output_features, record_length: int, config: UL2Config, modes: bool):
    """Documents to chunks that fit under every objective; none is dropped."""
    import_seqio()
    t5 = import_t5("t5.data.preprocessors")

    vocabulary = describe_vocabulary(output_features[FEATURE].vocabulary)
    longest = Objectives(config, vocabulary, record_length, mode_tokens=modes).longest
    return t5.split_tokens(
        dataset, max_tokens_per_segment=min(longest.values()), feature_key=FEATURE
    )


def _mix(dataset, output_features, config: UL2Config, modes: bool):
    """Draws an objective for each chunk, by share, and carries it out."""
    seqio = import_seqio()
    import numpy as np
    import tensorflow as tf
    t5 = import_t5("t5.data.preprocessors")

    vocabulary = output_features[FEATURE].vocabulary
    info = describe_vocabulary(vocabulary)
    mode = mode_ids(info)
    bounds = np.cumsum([config.shares[name] for name in OBJECTIVES])

    def with_mode(objective, inputs):
        head = tf.constant([mode[objective]] if modes else [], tf.int32)
        return tf.concat([head, tf.cast(inputs, tf.int32)], 0)

    def causal(tokens, seeds):
        del seeds
        return with_mode(CAUSAL, tokens[:0]), tokens

    def prefix(tokens, seeds):
        mask = t5.random_prefix_noise_mask(tf.size(tokens), 0.5, seeds)
        arguments = (tokens, mask, vocabulary, seeds)
        return with_mode(PREFIX, t5.drop_nonnoise_tokens(*arguments)), t5.drop_noise_tokens(
            *arguments
        )

    def span(tokens, seeds):
        # The targets end with EOS in any case; the document's own would stand twice.
        text = tokens[: tf.size(tokens) - tf.cast(tokens[-1] == info.eos_id, tf.int32)]
        mask = t5.random_spans_noise_mask(
            tf.size(text), config.noise_density, seeds, config.mean_span
        )
        arguments = (text, mask, vocabulary, seeds)
        targets = t5.nonnoise_span_to_unique_sentinel(*arguments)
        return (
            with_mode(SPAN, t5.noise_span_to_unique_sentinel(*arguments)),
            tf.concat([targets, [info.eos_id]], 0),
        )

    @seqio.map_over_dataset(num_seeds=1)
    def one(example, seed):
        seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 3))
        tokens = tf.cast(example[FEATURE], tf.int32)
        drawn = tf.random.stateless_uniform([], seeds[2])
        choice = tf.searchsorted(tf.constant(bounds, tf.float32), drawn[None], side="right")[0]
        choice = tf.minimum(choice, len(OBJECTIVES) - 1)
        text = tf.size(tokens) - tf.cast(tokens[-1] == info.eos_id, tf.int32)
        choice = tf.where(text < 2, 0, choice)  # too little to take something out of it
        inputs, targets = tf.switch_case(
            choice, [lambda f=f: f(tokens, seeds[:2]) for f in (causal, prefix, span)]
        )
        return {PROMPT: inputs, FEATURE: targets}

    return one(dataset)
