"""`stacking-jax vocab`: a SentencePiece vocabulary from the texts of a configuration."""

from __future__ import annotations

import argparse
from pathlib import Path

from stacking_jax import console
from stacking_jax.data.config import DataConfig
from stacking_jax.errors import UserError


def run(config: DataConfig, arguments: argparse.Namespace) -> None:
    """Trains, writes, measures and says how to use it.

    Raises:
      UserError: the file exists or cannot be written; or as `sample_texts` and
        `train_vocabulary`.
    """
    from stacking_jax.data.train_vocabulary import measure, train_vocabulary
    from stacking_jax.data.vocabularies import SentencePiece
    from stacking_jax.data.vocabulary_texts import parse_size, sample_texts

    out = Path(arguments.out).expanduser()
    _refuse_existing(out)
    if arguments.extra_ids < 0 or arguments.seed < 0:
        raise UserError("--extra_ids and --seed are at least 0")
    most_bytes = parse_size(arguments.sample)
    texts, held_out = sample_texts(config, most_bytes, arguments.seed)
    size = sum(len(text) for text in texts)
    pieces = arguments.vocab_size - arguments.extra_ids
    console.say(f"training from {size / 1e6:,.1f} MB of text in {len(texts):,} pieces of documents")
    model = train_vocabulary(
        (text.decode() for text in texts), pieces, model_type=arguments.model_type,
        symbols=arguments.symbol,
    )
    tokenizer = SentencePiece(model, arguments.extra_ids, out.name)
    _write_new(out, model)
    print(
        f"{out}: {pieces:,} pieces and room for {arguments.extra_ids} sentinels, "
        f"{tokenizer.vocab_size:,} ids, {len(model) / 1e3:,.0f} kB"
    )
    name, sample = ("held-out", held_out) if held_out else ("training", texts)
    found = measure(tokenizer, sample)
    print(
        f"{found.bytes_per_token:.2f} bytes per token on {found.text_bytes / 1e6:.2f} MB of {name} "
        "text"
    )
    if found.lossy:
        print(f"{found.lossy} of {found.texts} texts do not come back as they were: "
              f"{found.difference}")
    else:
        print(f"all {found.texts:,} texts come back byte for byte")
    print(
        f"use it with --gin.VOCABULARY='\"{out}\"' --gin.DataConfig.extra_ids={arguments.extra_ids}"
    )


def _refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; name a new file, vocabularies are never overwritten")


def _write_new(out: Path, model: bytes) -> None:
    """Writes the file whole or not at all, and never over another."""
    try:
        if not out.parent.is_dir():
            out.parent.mkdir(parents=True)
        with open(out, "xb") as file:
            try:
                file.write(model)
                file.flush()
            except OSError:
                out.unlink()
                raise
    except OSError as error:
        _refuse_existing(out)
        raise UserError(f"{out} cannot be written ({error.strerror or error})") from error
