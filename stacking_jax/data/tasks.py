"""seqio: our texts as registered Tasks, and any registered Task as tokens.

A seqio Task is the definition of the examples. For the texts that are read
here, the cache is written without TensorFlow and the tests hold it equal to
these Tasks; a Task or Mixture registered elsewhere is read through seqio.

seqio and TensorFlow are imported inside the functions, when a task is read.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from stacking_jax.data.building import Encoded, TokenDocument
from stacking_jax.data.config import DEFAULT_TASK, DataConfig
from stacking_jax.data.documents import open_corpus
from stacking_jax.data.splits import SPLITS, TRAIN, VALIDATION, assign_splits, split_corpus
from stacking_jax.data.vocabularies import (
    BYTES,
    Bytes,
    SentencePiece,
    VocabularyInfo,
    load_tokenizer,
    local_path,
    read_vocabulary,
)
from stacking_jax.errors import UserError

FEATURE = "targets"


def import_seqio():
    """seqio, with TensorFlow kept off the accelerators, which belong to JAX.

    Raises:
      UserError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import seqio
        import tensorflow as tf
    except ImportError as error:
        raise UserError(
            f"seqio tasks need TensorFlow and seqio ({error}): pip install 'stacking_jax[data]', "
            f"or use text_dir or the task {DEFAULT_TASK}, which need neither."
        ) from error
    for kind in ("GPU", "TPU"):
        try:
            tf.config.set_visible_devices([], kind)
        except RuntimeError:  # TensorFlow is already running; its devices are settled
            break
    return seqio


def register(config: DataConfig = DataConfig()) -> str:
    """Registers the seqio Task of a text read here, once; returns its name.

    The default configuration is "python_stdlib". The splits are "train" and,
    unless nothing is held out, "validation"; the only feature is "targets".
    """
    seqio = import_seqio()
    name = _task_name(config)
    if name in seqio.TaskRegistry.names():
        return name
    if config.vocabulary == BYTES:
        vocabulary = seqio.ByteVocabulary(config.extra_ids)
    else:
        vocabulary = seqio.SentencePieceVocabulary(local_path(config.vocabulary), config.extra_ids)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(_text_dataset, config),
            splits=SPLITS if config.held_out else (TRAIN,),
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={FEATURE: seqio.Feature(vocabulary, add_eos=True)},
    )
    return name


def _task_name(config: DataConfig) -> str:
    if config == DataConfig():
        return DEFAULT_TASK
    text = DEFAULT_TASK if config.text_dir is None else f"text:{os.path.abspath(config.text_dir)}"
    tokens = load_tokenizer(config.vocabulary, config.extra_ids).info.digest
    digest = hashlib.sha256(f"{text} {tokens} {config.held_out}".encode()).hexdigest()
    return f"{text.partition(':')[0]}_{digest[:12]}"


def _text_dataset(config: DataConfig, split: str, shuffle_files: bool, seed: int | None = None):
    """The documents of a split as a tf.data.Dataset, always in order: batches shuffle."""
    del shuffle_files, seed
    import tensorflow as tf

    def texts() -> Iterator[dict[str, bytes]]:
        documents, _ = split_corpus(open_corpus(config).read(), config.held_out)
        return ({FEATURE: document.text} for name, document in documents if name == split)

    signature = {FEATURE: tf.TensorSpec([], tf.string)}
    return tf.data.Dataset.from_generator(texts, output_signature=signature)


def encode_task(config: DataConfig) -> Encoded:
    """Reads a registered Task or Mixture, with the vocabulary that it brings.

    Its "validation" split is used where it has one; else the share `held_out`
    of its training examples is kept apart by a hash of their text. Of a
    mixture, training examples are drawn at its rates, as many as its tasks
    hold together: a task of a low rate is then not read to its end, one of a
    high rate more than once.

    Raises:
      UserError: no such task, or not one with `targets` alone and an EOS.
    """
    seqio = import_seqio()
    provider = _find(seqio, config.task)
    features = provider.output_features
    feature = features.get(FEATURE)
    if set(features) != {FEATURE} or feature.rank != 1 or not feature.dtype.is_integer:
        raise UserError(
            f"the seqio task {config.task} has the features {', '.join(sorted(features))}: a "
            f"language model is trained on one sequence of token ids called {FEATURE!r}."
        )
    if TRAIN not in provider.splits:
        raise UserError(
            f"the seqio task {config.task} has no {TRAIN!r} split (it has: "
            f"{', '.join(sorted(provider.splits))})."
        )
    info, model = _describe(seqio, config.task, feature.vocabulary)
    examples = functools.partial(_examples, seqio, provider, feature.vocabulary, info.eos_id)
    if config.held_out == 0:
        pairs = ((TRAIN, example) for example in examples(TRAIN))
        method = "nothing held out"
    elif VALIDATION in provider.splits:
        pairs = ((split, example) for split in SPLITS for example in examples(split))
        method = "the task's own splits"
    else:
        pairs = assign_splits(examples(TRAIN), config.held_out, _Example.content, config.task)
        method = "examples by SHA-256 of content"
    return Encoded(
        task=config.task,
        source=f"seqio {type(provider).__name__} {config.task}",
        vocabulary=info,
        documents=(
            TokenDocument(split, example.tokens, len(example.text), len(example.text))
            for split, example in pairs
        ),
        split_method=method,
        model=model,
    )


def _find(seqio, name: str):
    register()
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if name in known:
        return seqio.get_mixture_or_task(name)
    close = difflib.get_close_matches(name, known, n=3) or sorted(known)[:3]
    raise UserError(
        f"no seqio Task or Mixture {name!r} is registered: import the module that registers it, "
        f"or choose another (nearest: {', '.join(close)})."
    )


class _Example(NamedTuple):
    """Tokens ended by EOS, and their text in UTF-8: b"" if the vocabulary has none."""

    tokens: np.ndarray
    text: bytes

    def content(self) -> bytes:
        return self.text or self.tokens.tobytes()


def _examples(
    seqio, provider, vocabulary, eos_id: int, split: str
) -> Iterator[_Example]:
    """The examples of a split, the same in every run."""
    import tensorflow as tf

    tasks = [task for task in seqio.get_subtasks(provider) if split in task.splits]
    cached = any(task.requires_caching for task in tasks)
    # Preprocessors with chance in them take TensorFlow's global seed.
    tf.random.set_seed(0)
    arguments: dict[str, Any] = {"split": split, "shuffle": False, "use_cached": cached}
    if len(tasks) == 1 or split != TRAIN:
        dataset = provider.get_dataset(None, **arguments, num_epochs=1, **_keep_text(provider))
    else:
        count = sum(
            int(task.get_dataset(None, **arguments).reduce(np.int64(0), lambda n, _: n + 1))
            for task in tasks
        )
        dataset = provider.get_dataset(None, **arguments, num_epochs=None, **_keep_text(provider))
        dataset = dataset.take(count)
    for example in dataset.as_numpy_iterator():
        tokens = np.asarray(example[FEATURE])
        text = example.get(f"{FEATURE}_pretokenized")
        if not isinstance(text, bytes):
            decoded = vocabulary.decode(tokens.tolist())
            text = decoded.encode() if isinstance(decoded, str) else b""
        if not len(tokens) or tokens[-1] != eos_id:
            tokens = np.append(tokens, np.asarray(eos_id, tokens.dtype))
        yield _Example(tokens, text)


def _keep_text(provider) -> dict[str, bool]:
    """A mixture drops the text beside the tokens unless told not to; a task keeps it."""
    return {"copy_pretokenized": True} if hasattr(provider, "rate_per_task_name") else {}


def _describe(seqio, task: str, vocabulary) -> tuple[VocabularyInfo, bytes | None]:
    """What a seqio vocabulary is, and its SentencePiece model if it is one."""
    if vocabulary.eos_id is None or vocabulary.eos_id < 0:
        raise UserError(
            f"the vocabulary of the seqio task {task} has no end-of-sequence id: documents could "
            "not be told apart."
        )
    if type(vocabulary) is seqio.ByteVocabulary:
        return Bytes(vocabulary.extra_ids).info, None
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        path = vocabulary.sentencepiece_model_file
        name = os.path.basename(path)
        plain = SentencePiece(read_vocabulary(path), vocabulary.extra_ids, name)
        if plain.same_pieces(vocabulary.sp_model):
            return plain.info, plain.model
        # Its own normaliser or order of extra ids: keep the finished model.
        whole = SentencePiece(vocabulary.sp_model, 0, name)
        return whole.info, whole.model
    kind = type(vocabulary).__name__
    described = f"{kind} {vocabulary.vocab_size} {vocabulary.eos_id}"
    digest = hashlib.sha256(described.encode()).hexdigest()
    info = VocabularyInfo(
        kind, digest, vocabulary.extra_ids, vocabulary.vocab_size, vocabulary.eos_id
    )
    return info, None
