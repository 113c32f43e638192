"""The texts of the depth reasoning study say what is true, and splits share no program."""

from __future__ import annotations

import pytest

from benchmarks import depth_reasoning
from benchmarks.learned_primitive import HEADER, QUESTION


@pytest.fixture(scope="module")
def texts():
    return {split: depth_reasoning.texts_of(split, 12, seed=0) for split in ("train", "validation")}


def follow(program: str) -> dict[str, int]:
    """The variables of a program, as Python itself has them."""
    names: dict[str, int] = {}
    exec(program, {}, names)  # noqa: S102
    return names


@pytest.mark.parametrize("depth", depth_reasoning.DEPTHS)
def test_answers_are_those_of_the_program(texts, depth):
    for prompt, rest in texts["train"][f"asked_{depth}"]:
        *program, first = prompt.removeprefix(HEADER).splitlines()
        values = follow("\n".join(program))
        assert len(values) == 5 * (depth + 1)
        answers = [line.split(QUESTION) for line in (first + rest).splitlines()]
        assert all(values[name] == int(value) for name, value in answers)
        asked = [name for name, _ in answers]
        assert len(set(asked)) == len(asked) <= 5, "each is asked once: no answer stands above"


def test_every_kind_is_there_and_splits_share_no_program(texts):
    assert set(texts["train"]) == set(depth_reasoning.KINDS)
    for kind in depth_reasoning.KINDS:
        shared = {given for given, _ in texts["train"][kind]} & {
            given for given, _ in texts["validation"][kind]
        }
        assert not shared, kind


def test_repeated_lines_are_lines_of_the_program(texts):
    for prompt, rest in texts["train"]["repeated"]:
        assert set(rest.splitlines()) <= set(prompt.removeprefix(HEADER).splitlines())
