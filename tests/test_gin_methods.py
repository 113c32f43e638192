"""Files of gin/methods over one another: what goes together does, nothing is dropped in silence."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
import shutil
from pathlib import Path

import pytest

from stacking_jax import cli, configurables, gin_config
from stacking_jax.errors import UserError
from stacking_jax.gin_methods import BESIDE_GROWTH, TAKES_BACK, method_file
from stacking_jax.training import TrainConfig, compose
from stacking_jax.training.loop_config import LoopConfig

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/methods.md"
DEMO = "gin/experiments/demo.gin"
PLAIN = "gin/growth/baseline.gin"
METHODS = sorted(path.stem for path in gin_config.gin_root().glob("methods/*.gin"))
OTHERS = [name for name in METHODS if name != TAKES_BACK]
EXPERIMENTS = sorted(
    f"gin/experiments/{path.name}" for path in gin_config.gin_root().glob("experiments/*.gin")
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    gin_config.clear()


def method(name: str) -> str:
    return f"gin/methods/{name}.gin"


def laid(*files: str, bindings=()) -> TrainConfig:
    gin_config.load(files, bindings, configurables.register)
    return configurables.configured()


def refusal(*files: str, bindings=()) -> str:
    """The one line with which these are refused, before there is a configuration."""
    with pytest.raises(UserError) as caught:
        gin_config.load(files, bindings, configurables.register)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_method_that_was_asked_for_has_its_include():
    assert set(METHODS) >= {
        "gradstack", "midas", "lidas", "g_stack", "interleave", "looped", "middle_looped",
        "loop_regularised", "raptr", "layer_drop", "lag", "salt", "deep_progressive", "baseline",
    }


# What is refused


@pytest.mark.parametrize("order", [("midas", "raptr"), ("raptr", "midas")], ids=" then ".join)
def test_two_methods_that_replace_one_another_are_refused_in_both_orders(order):
    values = {"midas": "'midas'", "raptr": "None"}
    first, second = order
    assert refusal(DEMO, *map(method, order)) == (
        f"gin/methods/{first}.gin binds GrowthConfig.operator = {values[first]} and "
        f"gin/methods/{second}.gin after it {values[second]}, so that a part of one method would "
        "be lost: name one of the two"
    )


@pytest.mark.parametrize("name", ["midas", "gradstack", "deep_progressive_zero", "lag", "plateau"])
def test_the_line_says_how_to_pull_the_layers_of_a_stack_that_grows(name):
    pulled = "gin/methods/loop_regularised.gin"
    for order in ((method(name), pulled), (pulled, method(name))):
        line = refusal(DEMO, *order)
        said = re.search(rf"or in place of {pulled} bind (.+)$", line)[1]
        bindings, rest = gin_config.split_argv(shlex.split(said))
        config = laid(DEMO, method(name), bindings=bindings)
        assert not rest and {"growth", "similarity"} <= set(compose.used(config))
        assert config.plan().final_depth == 8


def spelled_otherwise(tmp_path: Path) -> dict[str, str]:
    """Ways to name gin/methods/raptr.gin."""
    real = gin_config.gin_root() / "methods/raptr.gin"
    (tmp_path / "link.gin").symlink_to(real)
    shutil.copytree(real.parent, tmp_path / "checkout/gin/methods")
    return {
        "absolute": str(real), "roundabout": str(real.parent / "../methods/raptr.gin"),
        "of the package": "methods/raptr.gin", "link": "link.gin",
        "checkout": "checkout/gin/methods/raptr.gin",
    }


def test_a_method_is_known_however_its_path_is_spelled(tmp_path):
    for path in spelled_otherwise(tmp_path).values():
        assert "gin/methods/midas.gin binds" in refusal(DEMO, method("midas"), path)
        assert "gin/methods/raptr.gin binds" in refusal(DEMO, path, method("midas"))


def test_an_installed_package_knows_its_own_methods_and_no_others(tmp_path):
    root = tmp_path / "site-packages/stacking_jax/gin_files"
    mine = tmp_path / "gin/methods"
    for path in (root / "methods/raptr.gin", mine / "raptr.gin", mine / "my_own.gin",
                 tmp_path / "raptr.gin"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    found = [method_file(path.resolve(), root) for path in (
        root / "methods/raptr.gin", mine / "raptr.gin", mine / "my_own.gin", tmp_path / "raptr.gin"
    )]
    assert [None if of is None else str(of) for of in found] == [
        "gin/methods/raptr.gin", "gin/methods/raptr.gin", None, None
    ]


def test_what_a_method_includes_is_its_own():
    line = refusal(DEMO, method("deep_progressive_zero"), method("midas"))
    assert line.startswith(
        "gin/methods/deep_progressive_zero.gin binds GrowthConfig.operator = 'inherit_first'"
    )
    assert "deep_progressive_zero.gin after it" in refusal(
        DEMO, method("deep_progressive"), method("deep_progressive_zero")
    )
    assert laid(DEMO, method("midas"), method("midas")).method == "midas"


def test_methods_that_a_file_of_ones_own_includes_are_held_to_it_too(tmp_path):
    mine = tmp_path / "mine.gin"
    mine.write_text(f"include '{DEMO}'\ninclude '{method('midas')}'\n")
    assert "gin/methods/raptr.gin after it None" in refusal("mine.gin", method("raptr"))


def test_a_file_of_ones_own_and_the_command_line_may_bind_anything(tmp_path):
    own = tmp_path / "midas.gin"
    own.write_text("GrowthConfig.operator = 'gradstack'\nPathConfig.method = None\n")
    for files in (["midas", "raptr"], ["raptr", "midas"]):
        config = laid(DEMO, *map(method, files), "midas.gin")
        assert config.method == "gradstack"
    # Between two methods it takes the first one back; in front of one it is laid over.
    own.write_text("GrowthConfig.operator = None\n")
    assert laid(DEMO, method("midas"), "midas.gin", method("raptr")).method == "raptr"
    own.write_text("GrowthConfig.operator = 'gradstack'\n")
    assert laid(DEMO, "midas.gin", method("raptr")).method == "raptr"
    decided = laid(
        DEMO, method("midas"), method("loop_regularised"),
        bindings=["GrowthConfig.operator='midas'"],
    )
    assert decided.method == "midas + loop regularised"


@pytest.mark.parametrize(
    "command", [["plan"], ["train", "--run_dir", "run"], ["distill-cache", "--out", "labels"]],
    ids=lambda words: words[0],
)
def test_every_command_refuses_before_it_runs_anything(command, tmp_path, capsys):
    files = [word for name in (DEMO, method("midas"), method("looped"))
             for word in ("--gin_file", name)]
    assert cli.main([*command, *files]) != 0
    assert capsys.readouterr().err.startswith("error: gin/methods/midas.gin binds")
    assert not list(tmp_path.iterdir())


def test_a_study_names_the_arm(tmp_path, capsys):
    (tmp_path / "study.gin").write_text(
        f"StudyConfig.arms = {{'both': {{'gin': ['{method('midas')}', '{method('raptr')}']}}}}\n"
    )
    assert cli.main(["study", "--gin_file", "study.gin", "--run_dir", "study"]) != 0
    assert capsys.readouterr().err.startswith("error: the arm 'both': gin/methods/midas.gin binds")


# The baseline


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_over_an_experiment_the_baseline_switches_growth_off_and_nothing_else(experiment):
    """So runs of the baseline that were begun go on."""
    assert laid(experiment, method(TAKES_BACK)) == laid(experiment, PLAIN)


@pytest.mark.parametrize("name", OTHERS)
def test_the_baseline_takes_back_what_came_before_it(name):
    plain = laid(DEMO, method(TAKES_BACK))
    config = laid(DEMO, method(name), method(TAKES_BACK))
    assert compose.used(config) == {} and config.method == "full depth"
    assert config.plan() == plain.plan()
    # And nothing that comes after it.
    assert compose.used(laid(DEMO, method(TAKES_BACK), method(name))) == own(name)
    # Nor is a method lost that it has taken back.
    other = "raptr" if name != "raptr" else "midas"
    assert laid(DEMO, method(name), method(TAKES_BACK), method(other)).method == other


def test_the_baseline_keeps_the_schedule_that_is_the_fair_one():
    wsd = laid(DEMO, method("deep_progressive")).optimizer
    assert laid(DEMO, method("deep_progressive"), method(TAKES_BACK)).optimizer == wsd
    assert wsd.schedule == "wsd"


def test_the_baseline_switches_off_all_of_a_loop(tmp_path):
    (tmp_path / "mine.gin").write_text(
        f"include '{DEMO}'\nGrowthConfig.operator = None\nLoopConfig.loops = 4\n"
        "LoopConfig.block = 2\nLoopConfig.curriculum = [2, 4]\nLoopConfig.inject = 'stream'\n"
        "LoopConfig.curriculum_fractions = [0.5, 0.5]\nLoopConfig.loss_loops = 2\n"
        "LoopConfig.backprop_loops = 2\nLoopConfig.tie = 'average'\n"
    )
    assert laid("mine.gin").loops.method == "looped"
    assert laid("mine.gin", method(TAKES_BACK)).loops == LoopConfig()


@pytest.mark.parametrize("name", OTHERS)
def test_what_plan_prints_is_full_depth_for_as_many_flops(name, capsys):
    """The hint, added to the same command."""
    command = ["plan", "--gin_file", DEMO, "--gin_file", method(name)]
    flops = laid(DEMO, method(name)).describe_plan()["model_flops"]
    assert cli.main(command) == 0
    said = re.search(r"steps at full depth:\s+(--gin_file.+\n?.*TRAIN_STEPS=\d+)",
                     capsys.readouterr().out)
    if said is None:
        # As many as the run has.
        equal = laid(DEMO, method(name), method(TAKES_BACK))
    else:
        bindings, rest = gin_config.split_argv(shlex.split(said[1]))
        assert rest == ["--gin_file", method(TAKES_BACK)]
        equal = laid(DEMO, method(name), rest[1], bindings=bindings)
    assert compose.used(equal) == {}
    assert equal.describe_plan()["model_flops"] == pytest.approx(flops, rel=0.02)


# The table of docs/methods.md


@functools.cache
def own(name: str) -> dict[str, str]:
    """What a run of the method alone uses."""
    return compose.used(laid(DEMO, PLAIN, method(name)))


def goes(one: str, other: str) -> bool:
    """Whether the two, laid over the demo in this order, make a run that uses both."""
    wanted = set(own(one)) | set(own(other))
    try:
        config = laid(DEMO, method(one), method(other))
        config.plan()
    except UserError:
        return False
    assert wanted <= set(compose.used(config)), f"{other} over {one} drops something in silence"
    return True


def goes_by_bindings(one: str, other: str) -> bool:
    """Whether what `BESIDE_GROWTH` has of `other`, bound by itself, goes with `one`."""
    if other not in BESIDE_GROWTH:
        return False
    laid(DEMO, method(other))
    import gin

    bindings = [f"{key}={gin.query_parameter(key)!r}" for key in BESIDE_GROWTH[other]]
    config = laid(DEMO, method(one), bindings=bindings)
    try:
        config.plan()
    except UserError:
        return False
    return set(own(one)) | set(own(other)) <= set(compose.used(config))


def table() -> list[str]:
    together = {name: [] for name in OTHERS}
    bound = {name: [] for name in OTHERS}
    for one, other in itertools.combinations(OTHERS, 2):
        both = goes(one, other)
        assert goes(other, one) == both, f"the order of {one} and {other} decides"
        if both:
            together[one].append(other)
            together[other].append(one)
        elif goes_by_bindings(one, other) or goes_by_bindings(other, one):
            bound[one].append(other)
            bound[other].append(one)
    assert set(BESIDE_GROWTH) == {"loop_regularised"}, "say its bindings in the head"
    lines = [
        "| include | laid together with | goes with, where `SimilarityConfig` is bound by itself |",
        "|---|---|---|",
    ]
    for name in OTHERS:
        cells = (", ".join(names) for names in (together[name], bound[name]))
        lines.append(f"| {name} | {' | '.join(cell or '–' for cell in cells)} |")
    return lines


@pytest.mark.slow
def test_the_docs_have_the_table_of_includes():
    lines = "\n".join(table())
    assert lines in PAGE.read_text(encoding="utf-8"), f"it is now:\n{lines}"


def test_of_a_pair_that_goes_together_the_order_does_not_matter():
    for pair in (["midas", "salt"], ["raptr", "loop_regularised"], ["loop_regularised", "salt"]):
        one, other = (laid(DEMO, *map(method, files)) for files in (pair, pair[::-1]))
        assert one == other and set(compose.used(one)) == {*own(pair[0]), *own(pair[1])}
