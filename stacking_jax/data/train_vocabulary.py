"""Training a SentencePiece vocabulary that gives every text back.

Newlines, tabs and carriage returns are pieces of their own, runs of spaces are kept, each digit
is one piece, and a character that is not in the vocabulary falls back to its bytes. Ids are as
T5's: padding 0, end of sequence 1, unknown 2. Trained by the `sentencepiece` library (Kudo and
Richardson 2018, arXiv:1808.06226) in one thread, so that the same text gives the same file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import io
import re
import threading
from collections.abc import Iterable, Iterator, Sequence

from stacking_jax import console
from stacking_jax.data.round_trip import first_difference
from stacking_jax.data.vocabularies import SentencePiece
from stacking_jax.errors import UserError

MODEL_TYPES = ("bpe", "unigram")
ALONE = ("\n", "\t", "\r")
"""Characters that are a piece of their own, whatever stands beside them."""

# The 256 bytes, padding, EOS, unknown, and the characters above.
FEWEST_PIECES = 256 + 3 + len(ALONE)
# What is longer is cut for training, and for training alone: the library drops such lines.
_LONGEST_LINE = 4000


@dataclasses.dataclass(frozen=True)
class Measured:
    """How a vocabulary does on text.

    Attributes:
      texts: how many were looked at.
      text_bytes: their bytes in UTF-8.
      tokens: their tokens, without EOS.
      lossy: how many do not come back byte for byte.
      difference: where the first of these parts, in words.
    """

    texts: int
    text_bytes: int
    tokens: int
    lossy: int
    difference: str | None

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(self.tokens, 1)


class Sample:
    """Texts chosen by a hash of seed and content, up to a number of bytes.

    The choice is that of the lowest hashes: neither the order in which texts come nor their
    number matters, and only what is kept is held in memory.

    Args:
      most_bytes: None keeps everything.
      seed: another seed, another choice.
    """

    def __init__(self, most_bytes: int | None, seed: int = 0):
        self._most = most_bytes
        self._salt = b"%d\n" % seed
        self._heap: list[tuple[int, bytes]] = []
        self._cut: int | None = None
        self.kept_bytes = self.seen_bytes = 0

    def add(self, text: bytes) -> None:
        self.seen_bytes += len(text)
        key = int.from_bytes(hashlib.blake2b(self._salt + text, digest_size=8).digest())
        if self._cut is not None and key >= self._cut:
            return
        heapq.heappush(self._heap, (-key, text))
        self.kept_bytes += len(text)
        while self._most is not None and self.kept_bytes > self._most:
            worst, dropped = heapq.heappop(self._heap)
            self._cut = -worst
            self.kept_bytes -= len(dropped)

    def texts(self) -> list[bytes]:
        """What was chosen, in the order of the hash."""
        return [text for _, text in sorted(self._heap, reverse=True)]


def train_vocabulary(
    texts: Iterable[str],
    vocab_size: int,
    *,
    model_type: str = "bpe",
    symbols: Sequence[str] = (),
    character_coverage: float = 0.9995,
) -> bytes:
    """Trains a SentencePiece model; returns the bytes of its file.

    Args:
      texts: to learn from, all held in memory by the library.
      vocab_size: pieces, the special ones included and sentinels not.
      model_type: "bpe" or "unigram" (as T5's). BPE trains several times faster, and has no
        ties: where two segmentations score the same, as in a run of one character, unigram
        leaves the choice to the library, and TensorFlow's copy of it chooses otherwise.
      symbols: texts that are one piece wherever they occur, such as "def " or "x=".
      character_coverage: the share of characters that get pieces; the rest is left to bytes.

    Raises:
      UserError: no text; a size that the text cannot fill or that leaves out its letters;
        another model type; or a symbol that is empty, given twice or not on one line.
    """
    import sentencepiece

    if model_type not in MODEL_TYPES:
        raise UserError(f"the model type is one of {', '.join(MODEL_TYPES)}; got {model_type!r}")
    _check_symbols(symbols)
    if vocab_size <= FEWEST_PIECES + len(symbols):
        raise UserError(
            f"a vocabulary of {vocab_size} pieces has no room for text: "
            f"{FEWEST_PIECES + len(symbols)} are taken by bytes, special ids, newlines and symbols; raise --vocab_size"
        )
    lines = _lines(texts)
    first = next(lines, None)
    if first is None:
        raise UserError("there is no text to train a vocabulary from")

    def run() -> bytes:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            # What comes in goes out again: nothing is normalised, joined or put in front.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            # A space is this mark within the library.
            user_defined_symbols=[*ALONE, *(text.replace(" ", "\u2581") for text in symbols)],
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            # Sums of several threads depend on how the text was dealt out.
            num_threads=1,
            max_sentence_length=4 * _LONGEST_LINE,
            minloglevel=2,
        )
        return model.getvalue()

    try:
        return _with_progress(run, f"training {vocab_size:,} pieces")
    except (RuntimeError, OSError) as error:
        raise _explained(error, vocab_size) from error


def measure(tokenizer: SentencePiece, texts: Sequence[bytes]) -> Measured:
    """Bytes per token, and whether texts come back byte for byte."""
    tokens = lossy = 0
    difference = None
    with console.progress("measuring", len(texts), "texts") as advance:
        for text in texts:
            decoded = text.decode()
            tokens += len(tokenizer.encode(decoded))
            found = first_difference(tokenizer, decoded)
            lossy += found is not None
            difference = difference or found
            advance()
    size = sum(len(text) for text in texts)
    return Measured(len(texts), size, tokens, lossy, difference)


def _check_symbols(symbols: Sequence[str]) -> None:
    for number, text in enumerate(symbols):
        if not text or text in symbols[:number] or set(text) & set(ALONE):
            raise UserError(
                f"--symbol {text!r}: a symbol is a text on one line, and given once"
            )


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of text as training sees them: without the characters that stand alone."""
    apart = re.compile("[" + "".join(ALONE) + "]+")
    for text in texts:
        for line in apart.split(text):
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _with_progress(run, description: str):
    """Calls `run` while a bar counts the seconds: the library says nothing before it is done."""
    outcome: dict[str, object] = {}

    def work() -> None:
        try:
            outcome["value"] = run()
        except BaseException as error:  # noqa: BLE001 - raised again below
            outcome["error"] = error

    # A daemon: an interrupted program does not wait for the library to end.
    thread = threading.Thread(target=work, daemon=True)
    with console.progress(description, None, "seconds") as advance:
        thread.start()
        while thread.is_alive():
            thread.join(timeout=1.0)
            if thread.is_alive():
                advance()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def _explained(error: BaseException, vocab_size: int) -> UserError:
    message = " ".join(str(error).split())
    most = re.search(r"value <= (\d+)", message)
    if most:
        return UserError(
            f"the text fills no more than {most[1]} pieces, and {vocab_size} are asked for: lower "
            "--vocab_size, or give more text"
        )
    needed = re.search(r"smaller than required_chars\D*(\d+) vs (\d+)", message)
    if needed:
        return UserError(
            f"{vocab_size} pieces do not hold the {needed[2]} characters and special pieces of "
            "the text: raise --vocab_size"
        )
    return UserError(f"the vocabulary could not be trained ({message})")
