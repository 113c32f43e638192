from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking_jax.data.tasks import import_seqio
from stacking_jax.data.train_vocabulary import Sample, measure, train_vocabulary
from stacking_jax.data.vocabularies import SentencePiece
from stacking_jax.errors import UserError

CODE = '''\
class Stack:
    """Holds layers, 2024 of them."""

    def grow(self, block=4):
        for i in range(10):
            if i % block == 0:
\t\t# a tab
                self.layers.append(self.layers[-1])
        return {"n": 1234567890, 'm': [0.125, 3e-4]}


'''
WIDE = "Höhe, 層を重ねる, \N{GRINNING FACE}\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN} e\u0301 ﬁ\u00a0x"


def texts(seed: int = 0) -> list[str]:
    """Programs and sentences with every letter of ASCII in them."""
    chosen = random.Random(seed)
    letters = [chr(i) for i in range(32, 127)]
    words = CODE.split() + "the model grows by stacking its own layers again".split()
    made = []
    for _ in range(300):
        body = " ".join(chosen.choices(words, k=30))
        made.append(CODE + body + "\n" + "".join(chosen.choices(letters, k=40)) + "\r\n")
    return made


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model_type(request):
    return request.param


@pytest.fixture(scope="module")
def model(model_type):
    return train_vocabulary(texts(), 600, model_type=model_type)


@pytest.fixture(scope="module")
def tokenizer(model):
    return SentencePiece(model, extra_ids=10, name="trained")


def test_the_same_text_gives_the_same_bytes(model_type):
    models = [train_vocabulary(texts(), 600, model_type=model_type) for _ in range(2)]
    assert models[0] == models[1]
    assert models[0] != train_vocabulary(texts(1), 600, model_type=model_type)


@pytest.mark.parametrize(
    "text",
    [
        CODE,
        CODE.replace("    ", "\t"),
        CODE.replace("\n", "\r\n"),
        WIDE,
        f"{CODE}{WIDE}\n\n\n  {WIDE}  ",
        "  leading and trailing  ",
        "\n",
        "",
        "a  b   c    d     e\t\tf \t g",
        "\0\x07\x1b\x7f\u2028\ufeff\ufffd",
        "<pad></s><unk><0x41><extra_id_0> <s>",
    ],
)
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="▁")))
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_as_t5s_and_digits_newlines_and_tabs_stand_alone(model):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert (processor.pad_id(), processor.eos_id(), processor.unk_id()) == (0, 1, 2)
    assert processor.bos_id() == -1
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    assert len(pieces) == len(set(pieces)) == 600
    for piece in pieces:
        if processor.is_byte(pieces.index(piece)):
            continue
        assert piece in ("\n", "\t", "\r") or not set(piece) & set("\n\t\r")
        assert piece.isdigit() <= (len(piece) == 1)
        assert not any(c.isdigit() for c in piece) or len(piece.strip("▁")) == 1
    assert processor.encode("1234", out_type=str) == list("1234")
    # Indentation is worth pieces of its own.
    assert "▁▁▁▁" in pieces


def test_seqio_reads_it_and_gives_the_same_ids(model, model_type, tokenizer, tmp_path):
    seqio = import_seqio()
    path = tmp_path / "trained.model"
    path.write_bytes(model)
    vocabulary = seqio.SentencePieceVocabulary(str(path), extra_ids=10)
    assert vocabulary.vocab_size == tokenizer.vocab_size == 610
    assert (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id) == (0, 1, 2)
    for text in (CODE, WIDE, "  x\n\ty "):
        ids = tokenizer.encode(text)
        assert vocabulary.encode(text) == ids
        from_tensorflow = vocabulary.encode_tf(text).numpy().tolist()
        if model_type == "bpe":
            assert from_tensorflow == ids
        # Unigram may break a tie otherwise there: the same pieces in another order.
        assert sorted(from_tensorflow) == sorted(ids)
        assert vocabulary.decode(ids) == text
    # The sentinels come behind, as the span corruption of t5 counts them.
    assert vocabulary.decode([609]).strip() == "<extra_id_0>"


def test_what_is_measured(tokenizer):
    sample = [CODE.encode(), WIDE.encode(), "a▁b".encode()]
    found = measure(tokenizer, sample)
    counts = [len(tokenizer.encode(text.decode())) for text in sample]
    assert (found.texts, found.tokens) == (3, sum(counts))
    assert found.text_bytes == sum(map(len, sample))
    assert found.bytes_per_token == found.text_bytes / found.tokens
    # The one character that SentencePiece itself uses for a space.
    assert found.lossy == 1 and "'a▁b' comes back as 'a b'" in found.difference


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.binary(min_size=1, max_size=30), unique=True), st.integers(0, 400),
    st.integers(0, 3), st.randoms(use_true_random=False),
)
def test_a_sample_does_not_depend_on_the_order(pieces, most, seed, chosen):
    def sample(pieces, most=most):
        kept = Sample(most, seed)
        for piece in pieces:
            kept.add(piece)
        assert kept.kept_bytes == sum(map(len, kept.texts()))
        assert kept.seen_bytes == sum(map(len, pieces))
        return kept.texts()

    shuffled = chosen.sample(pieces, len(pieces))
    everything = sample(pieces, None)
    assert sorted(everything) == sorted(pieces)
    first = sample(pieces)
    assert first == sample(shuffled) and sum(map(len, first)) <= most
    # The longest run of lowest hashes that fits.
    assert first == everything[: len(first)]
    if len(first) < len(everything):
        assert sum(map(len, everything[: len(first) + 1])) > most


def test_symbols_are_whole_wherever_they_occur():
    symbols = ["x=", "___. ->"]
    model = train_vocabulary(texts(), 400, symbols=symbols)
    tokenizer = SentencePiece(model, 0, "symbols")
    for text in ("x=12", "ax=___. ->7\n", "x= ___. -> x"):
        pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert [piece for piece in pieces if piece in symbols] == [
            symbol for symbol in sorted(symbols, key=text.find) if symbol in text
        ]


@pytest.mark.parametrize(
    "given_texts, size, options, complaint",
    [
        ([], 1000, {}, "no text"),
        (["abc"], 200, {}, "no room for text"),
        (texts(), 100_000, {}, "fills no more than \\d+ pieces"),
        (texts(), 270, {}, "raise --vocab_size"),
        (texts(), 1000, {"model_type": "word"}, "model type is one of"),
        (texts(), 1000, {"symbols": ["x", "x"]}, "--symbol 'x': .* given once"),
        (texts(), 1000, {"symbols": ["a\nb"]}, "on one line"),
    ],
)
def test_what_cannot_be_trained(given_texts, size, options, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        train_vocabulary(given_texts, size, **options)
    assert "\n" not in str(caught.value)
