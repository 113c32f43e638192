"""gin files and bindings: found anywhere, overriding in order, and refused if they do nothing."""

from __future__ import annotations

import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gin
from stacking_jax import gin_config
from stacking_jax.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
MODULE = "gin_config_probe"


@gin.configurable(module=MODULE)
def probe_train(steps=1, text_dir=None, schedule=None, layers=(), operator="midas"):
    return dict(
        steps=steps, text_dir=text_dir, schedule=schedule, layers=layers, operator=operator
    )


@gin.configurable(module=MODULE)
def probe_cosine(peak=0.1, warmup=10):
    return (peak, warmup)


@gin.configurable(module=MODULE, denylist=["secret"])
def probe_any(secret=0, **options):
    return options


@gin.configurable(module=MODULE)
def probe_required(width=gin.REQUIRED):
    return width


@gin.configurable(module=MODULE)
def probe_refuses():
    raise UserError("the batch of 3 does not divide over 2 devices: use 2 or 4")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    gin_config.clear()


def write(path: str, text: str) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(textwrap.dedent(text))
    return path


def load(files=(), bindings=(), **options):
    return gin_config.load(files, bindings, register=lambda: None, **options)


def refusal(files=(), bindings=(), **options) -> str:
    """The message with which these are refused: always one line, and gin holds nothing then."""
    with pytest.raises(UserError) as caught:
        load(files, bindings, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert probe_train()["steps"] == 1
    return message


DEMO = """
    TRAIN_STEPS = 100
    TEXT_DIR = None
    probe_train.steps = %TRAIN_STEPS
    probe_train.text_dir = %TEXT_DIR
    probe_train.schedule = @probe_cosine()
"""


# Values, files and their order


def test_later_files_and_bindings_override_earlier_ones():
    demo = write("demo.gin", DEMO)
    baseline = write("baseline.gin", "probe_train.operator = None\nTRAIN_STEPS = 50\n")
    load([demo])
    assert probe_train()["operator"] == "midas"
    assert probe_train()["steps"] == 100
    load([demo, baseline])
    assert probe_train()["operator"] is None
    assert probe_train()["steps"] == 50
    load([demo, baseline], ["TRAIN_STEPS=7", "TRAIN_STEPS=8", "probe_cosine.peak = 3e-4"])
    assert probe_train()["steps"] == 8
    assert probe_train()["schedule"] == (3e-4, 10)


def test_a_load_forgets_the_one_before():
    demo = write("demo.gin", DEMO)
    load([demo])
    load([], ["probe_cosine.warmup=3"])
    assert probe_train()["steps"] == 1
    assert probe_cosine() == (0.1, 3)


def test_blocks_scopes_containers_and_macros_of_macros():
    write(
        "a.gin",
        """
        BASE = 4
        LAYERS = [%BASE, 8]
        probe_train:
            steps = 3  # a comment
            layers = %LAYERS
            schedule = {'warm': @warm/probe_cosine()}
        warm/probe_cosine.peak = 0.5
        """,
    )
    load(["a.gin"], ["BASE=2"])
    assert probe_train()["layers"] == [2, 8]
    assert probe_train()["schedule"] == {"warm": (0.5, 10)}


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("-2.5e-3", -2.5e-3),
        ("None", None),
        ("'a = b'", "a = b"),
        ('"my/texts"', "my/texts"),
        ("[1, (2, 'x'), {'k': True}]", [1, (2, "x"), {"k": True}]),
    ],
)
def test_values_of_bindings(text, value):
    load([], [f"probe_train.text_dir={text}"])
    assert probe_train()["text_dir"] == value


def test_texts_show_what_was_bound_and_what_was_used():
    demo = write("demo.gin", DEMO)
    loaded = load([demo], ["TRAIN_STEPS=9"])
    assert "TRAIN_STEPS = 9" in loaded.text
    assert loaded.bindings == ("TRAIN_STEPS=9",)
    assert loaded.files == (Path(demo).resolve(),)
    assert "warmup" not in gin_config.operative_text()
    probe_train()
    operative = gin_config.operative_text()
    assert "probe_cosine.warmup = 10" in operative
    # The saved text, read again, gives the same values.
    again = write("again.gin", operative)
    used = probe_train()
    load([again])
    assert probe_train() == used


def test_the_configuration_is_locked_until_cleared():
    load([], ["probe_train.steps=2"])
    with pytest.raises(RuntimeError):
        gin.bind_parameter("probe_train.steps", 3)
    gin_config.clear()
    assert probe_train()["steps"] == 1


def test_a_file_may_import_a_module_of_configurables(monkeypatch):
    write(
        "gin_probe_plugin.py",
        """
        import gin

        @gin.configurable
        def probe_plugin(size=1):
            return size
        """,
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    write("own.gin", "import gin_probe_plugin\nprobe_plugin.size = 5\n")
    load(["own.gin"], imports=["gin_probe_plugin"])
    assert sys.modules["gin_probe_plugin"].probe_plugin() == 5
    assert "import gin_probe_plugin" in gin_config.operative_text()
    write("none.gin", "\nimport gin_probe_no_such_module\n")
    assert "none.gin:2: No module named" in refusal(
        ["none.gin"], imports=["gin_probe_no_such_module"]
    )
    write("dynamic.gin", "from __gin__ import dynamic_registration\n")
    assert "dynamic registration is not supported" in refusal(["dynamic.gin"])


@pytest.mark.parametrize(
    "statement",
    [
        "import gin_probe_evil",
        "import gin_probe_evil as fine",
        "from gin_probe_evil import anything",
        "import gin_probe_evil.sub",
        "import stacking_jax_evil",
    ],
)
def test_a_file_imports_only_what_was_named(statement, monkeypatch):
    """Neither itself nor an included file; and nothing of the module is run."""
    for name in ("gin_probe_evil", "stacking_jax_evil"):
        write(f"{name}/__init__.py", "raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    write("bad.gin", f"# Looks harmless.\n\n{statement}\n")
    write("outer.gin", "include 'bad.gin'\n")
    for name in ("bad.gin", "outer.gin"):
        message = refusal([name], imports=["gin_probe_plugin", "gin_probe"])
        assert message.startswith("bad.gin:3: ") and statement in message
        assert "--gin_import" in message
    assert "gin_probe_evil" not in sys.modules


def test_a_file_may_import_this_package_and_what_lies_in_a_named_one(monkeypatch):
    write("gin_probe_trusted/__init__.py", "")
    write("gin_probe_trusted/tasks.py", "READ = True")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    write("own.gin", "import stacking_jax.data.config\nimport gin_probe_trusted.tasks\n")
    load(["own.gin"], imports=["gin_probe_trusted"])
    assert sys.modules["gin_probe_trusted.tasks"].READ


def test_the_files_of_the_package_import_nothing():
    for path in gin_config.gin_root().rglob("*.gin"):
        assert "import" not in [line.split()[0] for line in path.read_text().splitlines() if line]


# Finding files


def test_files_are_found_from_any_directory(tmp_path, monkeypatch):
    root = tmp_path / "package" / "gin"
    monkeypatch.setattr("stacking_jax.gin_table.gin_root", lambda: root)
    write(str(root / "models/tiny.gin"), "probe_train.layers = 2\n")
    write(
        str(root / "experiments/demo.gin"),
        "include 'gin/models/tiny.gin'\ninclude 'near.gin'\n",
    )
    write(str(root / "experiments/near.gin"), "probe_train.operator = 'near'\n")
    for name in ("gin/experiments/demo.gin", "experiments/demo.gin"):
        loaded = load([name])
        assert [path.name for path in loaded.files] == ["demo.gin", "tiny.gin", "near.gin"]
        assert probe_train()["layers"] == 2
        assert probe_train()["operator"] == "near"
    # The working directory comes first, so that a person can lay own files over ours.
    write("gin/models/tiny.gin", "probe_train.layers = 3\n")
    load(["gin/experiments/demo.gin"])
    assert probe_train()["layers"] == 3
    load([str(root / "models/tiny.gin")])
    assert probe_train()["layers"] == 2
    assert "did you mean gin/experiments/demo.gin" in refusal(["gin/experiments/dmo.gin"])
    assert "did you mean gin/experiments/demo.gin" in refusal(["demo"])


def test_a_missing_file_names_its_neighbours_and_who_includes_it():
    write("runs/mine.gin", "include 'modell.gin'\n")
    write("runs/model.gin", "probe_train.steps = 2\n")
    message = refusal(["runs/mine.gin"])
    assert "no gin file 'modell.gin' (included by runs/mine.gin:1)" in message
    assert "did you mean model.gin" in message
    assert "did you mean runs/mine.gin" in refusal(["runs/min.gin"])


def test_unreadable_files(tmp_path):
    Path("latin.gin").write_bytes("# caf\xe9\n".encode("latin-1"))
    assert "latin.gin is not UTF-8 text" in refusal(["latin.gin"])
    Path("folder.gin").mkdir()
    assert "no gin file 'folder.gin'" in refusal(["folder.gin"])
    write("a.gin", "include 'b.gin'\n")
    write("b.gin", "\ninclude 'a.gin'\n")
    assert refusal(["a.gin"]) == "a.gin includes itself (included by b.gin:2)"


def test_gin_root_holds_gin_files_only():
    root = gin_config.gin_root()
    assert root.name in ("gin", "gin_files")
    assert not list(root.rglob("*.py"))


# Names that name nothing


@pytest.mark.parametrize(
    "binding, parts",
    [
        ("TRAIN_STEP=200", ["nothing uses a macro TRAIN_STEP", "did you mean TRAIN_STEPS"]),
        ("train_steps=200", ["did you mean TRAIN_STEPS"]),
        ("warmup=200", ["did you mean probe_cosine.warmup"]),
        ("probe_cosine=1", ["did you mean probe_cosine.peak, probe_cosine.warmup"]),
        ("probe_trian.steps=2", ["nothing is registered as probe_trian", "mean probe_train"]),
        ("Nonsense.warmup=2", ["registered as Nonsense", "mean probe_cosine.warmup"]),
        ("probe_train.stepz=2", ["probe_train has no parameter stepz; did you mean steps"]),
        ("probe_cosine.xyz=2", ["has no parameter xyz; it has: peak, warmup"]),
        ("probe_any.secret=2", ["probe_any has no parameter secret"]),
        ("probe_train.schedule=@probe_cosin()", ["registered as @probe_cosin", "probe_cosine"]),
        ("probe_train.steps=%TRAIN_STEP", ["%TRAIN_STEP, which is not set", "TRAIN_STEPS"]),
        ("wram/probe_cosine.peak=1", ["nothing runs in a scope wram", "warm"]),
    ],
)
def test_a_binding_that_names_nothing_is_refused_with_the_nearest_names(binding, parts):
    demo = write("demo.gin", DEMO + "    probe_train.layers = [@warm/probe_cosine()]\n")
    message = refusal([demo], [binding])
    assert message.startswith(f"--gin.{binding}: ")
    for part in parts:
        assert part in message


def test_free_keyword_arguments_stay_free():
    load([], ["probe_any.whatever=3"])
    assert probe_any() == {"whatever": 3}


def test_scopes_entered_by_python_are_known():
    assert "nothing runs in a scope eval" in refusal([], ["eval/probe_cosine.peak=1"])
    load([], ["eval/probe_cosine.peak=1"], scopes=["eval"])
    with gin.config_scope("eval"):
        assert probe_cosine() == (1, 10)


def test_names_in_files_are_checked_with_their_line():
    demo = write("demo.gin", DEMO + "    PEEK = 3\n")
    assert refusal([demo]).startswith("demo.gin:7: nothing uses a macro PEEK; did you mean ")
    write("a.gin", "\nprobe_train.stepz = 1\n")
    assert refusal(["a.gin"]).startswith("a.gin:2: probe_train has no parameter stepz")
    write("b.gin", "probe_trian:\n    steps = 1\n")
    assert refusal(["b.gin"]).startswith("b.gin:1: nothing is registered as probe_trian")
    write("c.gin", "\n\nprobe_train.schedule = @probe_cosin()\n")
    assert refusal(["c.gin"]).startswith("c.gin:3: nothing is registered as @probe_cosin")
    write("d.gin", "probe_train.steps = %NO_SUCH\n")
    assert "d.gin:1: probe_train.steps refers to %NO_SUCH, which is not set" in refusal(["d.gin"])


def test_a_macro_whose_use_was_replaced():
    demo = write("demo.gin", DEMO)
    over = write("over.gin", "\nprobe_train.steps = 5\n")
    # The file's own macro has lost its use, which is what an overlay is for ...
    load([demo, over])
    assert probe_train()["steps"] == 5
    # ... but setting it from the command line would do nothing.
    message = refusal([demo, over], ["TRAIN_STEPS=7"])
    assert "nothing uses TRAIN_STEPS any more: over.gin:2 replaced" in message
    assert "`probe_train.steps = ...` of demo.gin:4" in message
    chain = write("chain.gin", "A = %B\nB = 3\nprobe_train.steps = %A\n")
    assert "only A (chain.gin:1) uses B, and nothing uses that" in refusal(
        [chain, over], ["B=7"]
    )


def test_required_values():
    write("a.gin", "TEXT_DIR = %gin.REQUIRED\nprobe_train.text_dir = %TEXT_DIR\n")
    assert "TEXT_DIR must be set: add --gin.TEXT_DIR=VALUE (a.gin:1" in refusal(["a.gin"])
    load(["a.gin"], ['TEXT_DIR="texts"'])
    assert probe_train()["text_dir"] == "texts"
    # An overlay that has no use for the macro needs no value for it either.
    write("b.gin", "probe_train.text_dir = None\n")
    load(["a.gin", "b.gin"])
    write("c.gin", "probe_train.layers = [1, %gin.REQUIRED]\n")
    assert "probe_train.layers must be set" in refusal(["c.gin"])


# Syntax


@pytest.mark.parametrize("value", ["my/texts", "texts", "C4 en", "a.jsonl.gz", "~/x", "it's"])
def test_a_string_without_quotes_gets_the_way_to_quote_it(value):
    message = refusal([], [f"probe_train.text_dir={value}"])
    flag = shlex.split(message.rpartition("it is written ")[2])
    assert len(flag) == 1
    load([], gin_config.bindings_from_argv(flag))
    assert probe_train()["text_dir"] == value


def test_truth_values_of_other_languages():
    assert refusal([], ["probe_train.steps=true"]).endswith(
        "it is written --gin.probe_train.steps=True"
    )


@pytest.mark.parametrize("value", ["[1, 2", "3 4", "'abc", "1\nprobe_train.layers = 2", "$"])
def test_values_that_do_not_parse(value):
    with pytest.raises(UserError, match="probe_train.steps"):
        load([], [f"probe_train.steps={value}"])


@pytest.mark.parametrize(
    "text, where",
    [
        ("\nprobe_train.steps = my/texts\n", "a.gin:2: my is not a value"),
        ("probe_train.steps 3\n", "a.gin:1: "),
        ("probe_train.layers = [1,\n", "a.gin:"),
        ("probe_train:\nsteps = 3\n", "a.gin:2: "),
        ("include nothing\n", "a.gin:1: "),
    ],
)
def test_syntax_errors_in_files_name_the_line(text, where):
    write("a.gin", text)
    assert refusal(["a.gin"]).startswith(where)


# The command line


def test_bindings_are_taken_from_a_command_line():
    line = ["train", "--gin_file", "a.gin", '--gin.TEXT_DIR="my texts"', "--gin.a.b.c=3",
            "--gin.warm/x.y='k=v'", "--run_dir", "d"]  # fmt: skip
    bindings, rest = gin_config.split_argv(line)
    assert bindings == ['TEXT_DIR="my texts"', "a.b.c=3", "warm/x.y='k=v'"]
    assert rest == ["train", "--gin_file", "a.gin", "--run_dir", "d"]
    assert gin_config.split_argv(["--", "--gin.a=1"]) == ([], ["--", "--gin.a=1"])
    assert gin_config.bindings_from_argv(["--gin.A=1"]) == ["A=1"]


@pytest.mark.parametrize(
    "argument, part",
    [
        ("--run_dri=x", "unknown argument --run_dri=x; did you mean --run_dir?"),
        ("-gin.A=1", "--gin.NAME=VALUE?"),
        ("--gin.A", "write --gin.A=VALUE"),
        ("--gin.A=", "a value is missing"),
        ("--gin.=3", "is no gin name"),
        ("--gin.A-B=3", "'A-B' is no gin name"),
        ("extra", "unknown argument extra; did you mean --run_dir"),
    ],
)
def test_arguments_that_are_refused(argument, part):
    with pytest.raises(UserError) as caught:
        gin_config.bindings_from_argv([argument], ["--run_dir", "--gin_file"])
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# Errors of configurables


def test_errors_inside_configurables_become_one_line():
    load([])
    with pytest.raises(UserError) as lengthened:
        probe_refuses()
    assert "\n" in str(lengthened.value)
    with pytest.raises(UserError) as caught, gin_config.one_line_errors():
        probe_refuses()
    assert str(caught.value) == "the batch of 3 does not divide over 2 devices: use 2 or 4"
    with pytest.raises(UserError, match="add --gin.probe_required.width=VALUE$"):
        with gin_config.one_line_errors():
            probe_required()
    with pytest.raises(RuntimeError, match="another"), gin_config.one_line_errors():
        raise RuntimeError("another")


def test_a_missing_gin_config_is_named_from_the_repository_root(tmp_path):
    """`import gin` finds the folder of .gin files there; the real gin is hidden."""
    write("checkout/gin/models/tiny.gin", "")
    program = textwrap.dedent(
        """
        import importlib.abc, importlib.machinery, pathlib, sys

        class Hide(importlib.machinery.PathFinder):
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                spec = super().find_spec(name, path, target)
                if name == "gin" and spec is not None and spec.origin is not None:
                    here = [str(pathlib.Path.cwd())] if pathlib.Path("gin").is_dir() else []
                    return super().find_spec(name, here, target)
                return spec

        sys.meta_path = [
            Hide if finder is importlib.machinery.PathFinder else finder
            for finder in sys.meta_path
        ]
        from stacking_jax import gin_config
        assert "gin" not in sys.modules, "importing gin_config must not import gin"
        try:
            gin_config.load([])
        except gin_config.UserError as error:
            print(error)
        """
    )
    for folder, part in [(tmp_path / "checkout", "found only the folder"), (tmp_path, "")]:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.append({str(REPOSITORY)!r})\n{program}"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("gin-config is not installed")
        assert part in done.stdout
        assert done.stdout.count("\n") == 1
