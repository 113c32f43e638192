"""The command line as a person meets it: from another folder, with small mistakes."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stacking_jax import cli

ROOT = Path(__file__).resolve().parents[1]

TINY = """
include 'gin/experiments/demo.gin'

DecoderConfig.num_layers = 4
DecoderConfig.d_model = 32
DecoderConfig.d_ff = 64
DecoderConfig.num_heads = 2
NUM_STAGES = 2
TRAIN_STEPS = 6
SEQUENCE_LENGTH = 64
TEXT_DIR = 'my/texts'
TrainConfig.log_every = 1
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder of a person's own, with one file of text and a small experiment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my/texts").mkdir(parents=True)
    lines = (f"{i} bottles of beer, {i * i} more of wine\n" for i in range(400))
    (tmp_path / "my/texts/songs.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "tiny.gin").write_text(TINY, encoding="utf-8")


@pytest.fixture
def run(capsys):
    """run("plan", ...) -> (exit code, standard output, standard error)"""

    def call(*argv):
        code = cli.main([str(argument) for argument in argv])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def refusal(run):
    """refusal("plan", ...): the one line that the command says."""

    def call(*argv) -> str:
        code, out, err = run(*argv)
        assert code == 2 and out == ""
        [line] = err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    return call


def fresh_process(*argv) -> subprocess.CompletedProcess:
    """The command in a process of its own, which prints the modules it has loaded."""
    program = (
        "import sys\n"
        "from stacking_jax.cli import main\n"
        "try:\n"
        f"    code = main({list(argv)!r})\n"
        "except SystemExit as done:\n"
        "    code = done.code or 0\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


# ---- Help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(argv):
    done = fresh_process(*argv)
    assert done.returncode == 0 and done.stdout
    heavy = {"jax", "jaxlib", "gin", "flax", "optax", "orbax", "tensorflow", "seqio", "numpy"}
    assert not heavy & set(done.stderr.split())


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for command in ("train", "plan", "cache", "generate", "compare"):
        assert command in text


def test_a_plan_loads_no_tensorflow():
    done = fresh_process("plan", "--gin_file", "tiny.gin", "--json")
    assert done.returncode == 0, done.stderr
    assert not {"tensorflow", "seqio", "t5", "orbax"} & set(done.stderr.split())


# ---- Plan ----------------------------------------------------------------------------------------


def test_a_plan_as_json(run):
    code, out, _ = run("plan", "--gin_file", "gin/experiments/demo.gin", "--json")
    plan = json.loads(out)
    assert code == 0
    assert {"stages", "total_steps", "speedup_blocks", "speedup_model"} <= set(plan)
    for stage in plan["stages"]:
        assert {"depth", "steps", "params", "flops_per_token"} <= set(stage)
    assert [stage["depth"] for stage in plan["stages"]] == [2, 4, 6, 8]
    assert sum(stage["steps"] for stage in plan["stages"]) == plan["total_steps"]
    blocks = sum(s["steps"] * s["depth"] for s in plan["stages"]) / plan["total_steps"] / 8
    assert plan["speedup_blocks"] == pytest.approx(1 / blocks)
    full = plan["stages"][-1]["flops_per_token"] * plan["total_steps"]
    spent = sum(s["steps"] * s["flops_per_token"] for s in plan["stages"])
    assert plan["speedup_model"] == pytest.approx(full / spent)


@pytest.mark.parametrize("file", ["tiny.gin", "gin/experiments/midas_8b_prop2.gin"])
def test_planned_parameters_are_the_true_ones(run, file):
    import jax
    from flax import nnx

    from stacking_jax import configurables
    from stacking_jax.models import Decoder

    _, out, _ = run("plan", "--gin_file", file, "--json")
    model = configurables.configured().model
    for stage in json.loads(out)["stages"]:
        build = functools.partial(Decoder, model, depth=stage["depth"])
        shapes = nnx.eval_shape(lambda: build(key=jax.random.key(0)))  # noqa: B023
        leaves = jax.tree.leaves(nnx.state(shapes, nnx.Param))
        assert stage["params"] == sum(leaf.size for leaf in leaves)


def test_a_plan_as_a_table(run):
    code, out, err = run("plan", "--gin_file", "gin/experiments/midas_1b_prop2.gin")
    assert code == 0 and err == ""
    for word in ("24", "781", "speed-up", "1.24×"):
        assert word in out


def test_a_later_file_and_a_binding_override_an_earlier_one(run):
    tiny = ["plan", "--json", "--gin_file", "tiny.gin"]
    _, out, _ = run(*tiny, "--gin_file", "gin/growth/baseline.gin", "--gin.TRAIN_STEPS=70")
    plan = json.loads(out)
    assert [(stage["depth"], stage["steps"]) for stage in plan["stages"]] == [(4, 70)]
    assert plan["speedup_blocks"] == plan["speedup_model"] == 1
    _, out, _ = run(*tiny, "--gin_file", "gin/growth/gradstack_prop1.gin")
    assert json.loads(out)["stages"][1]["operator"] == "gradstack"


# ---- A run, from its text to its report ---------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder in which `train` has run to its end, as another process would do it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "my/texts").mkdir(parents=True)
    lines = (f"{i} bottles of beer, {i * i} more of wine\n" for i in range(400))
    (folder / "my/texts/songs.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "tiny.gin").write_text(TINY, encoding="utf-8")
    before = os.getcwd()
    os.chdir(folder)
    try:
        command = ["train", "--gin_file", "tiny.gin", "--run_dir", "runs/mine", "--gin.SEED=3"]
        assert cli.main([*command, "--stop_at", "4"]) == 0
        assert not (folder / "runs/mine/summary.json").exists()
        assert cli.main(command) == 0
    finally:
        os.chdir(before)
    return folder


def test_training_on_a_folder_of_one_file(finished):
    summary = json.loads((finished / "runs/mine/summary.json").read_text())
    assert summary["name"] == "mine" and summary["final_step"] == 6
    assert summary["growths"] == [1] and summary["comparability"]["seed"] == 3
    for key in ("params_digest", "train_loss", "eval_loss", "tokens", "wall_seconds"):
        assert summary[key]
    plan = json.loads((finished / "runs/mine/plan.json").read_text())
    assert summary["model_flops"] == plan["model_flops"]
    config = json.loads((finished / "runs/mine/config.json").read_text())["config"]
    assert config["data"]["text_dir"] == "my/texts" and config["seed"] == 3


def test_the_operative_configuration_is_kept_and_makes_the_same_run(finished, run, monkeypatch):
    text = (finished / "runs/mine/config.gin").read_text()
    assert "SEED = 3" in text and "DecoderConfig.d_model = 32" in text
    monkeypatch.chdir(finished)
    code, out, err = run("train", "--gin_file", "runs/mine/config.gin", "--run_dir", "runs/mine")
    assert code == 0 and "already complete" in err
    assert out.startswith("mine: step 6, held-out loss ") and "bits per byte" in out


@pytest.mark.slow
def test_generating_from_a_run(finished, run, monkeypatch):
    monkeypatch.chdir(finished)
    command = ["generate", "--run_dir", "runs/mine", "--prompt", "12 bot", "--max_new_tokens", 8]
    code, out, _ = run(*command, "--temperature", 0)
    assert code == 0 and out.startswith("12 bot")
    assert run(*command, "--temperature", 0)[1] == out
    _, out, _ = run(*command, "--num_samples", 2, "--top_k", 5, "--top_p", 0.9, "--seed", 1)
    assert out.count("12 bot") == 2


def test_comparing_runs(finished, run, monkeypatch):
    monkeypatch.chdir(finished)
    shutil.copytree("runs/mine", "runs/yours", dirs_exist_ok=True)
    code, out, _ = run("compare", "runs/mine", "runs/yours", "--out", "report.html")
    assert code == 0 and "mine" in out
    page = (finished / "report.html").read_text()
    assert "<svg" in page and "://" not in page.replace("http://www.w3.org", "")
    code, out, _ = run("compare", "runs/mine", "--json")
    assert json.loads(out)["rows"]


def test_caching_alone(run):
    code, out, _ = run("cache", "--gin_file", "tiny.gin")
    assert code == 0 and out.count("records of 64") == 2


def test_another_configuration_is_refused(finished, refusal, monkeypatch):
    monkeypatch.chdir(finished)
    message = refusal(
        "train", "--gin_file", "tiny.gin", "--gin.SEED=4", "--gin.LEARNING_RATE=0.1",
        "--run_dir", "runs/mine",
    )
    assert message.endswith(
        "Differences: optimizer.peak_learning_rate: 0.003 -> 0.1; seed: 3 -> 4"
    )


# ---- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("binding", "part"),
    [
        ("NUM_STAGES=3", "a depth of 4 cannot be reached in 3 equal stages"),
        ("TRAIN_STEPS=1", "leave none for stage 1 of 2"),
        ("TRAIN_STEPS=-5", "total_steps must be a whole number of at least 1; got -5"),
        ("DecoderConfig.num_heads=3", "3 heads do not divide a width of 32"),
        ("GrowthConfig.operator='midass'", "did you mean midas"),
        ("TRAIN_STEP=200", "did you mean TRAIN_STEPS"),
        ("TrainConfig.batchsize=8", "did you mean batch_size"),
        ("TrainConf.batch_size=8", "TrainConfig"),
        ("LEARNING_RATE=fast", "as a string it is written"),
        ("LEARNING_RATE='fast'", "peak_learning_rate must be a positive number"),
        ("MeshConfig.fsdp=0", "axes are positive whole numbers"),
        ("DataConfig.held_out=2", "held_out is 2"),
    ],
)
def test_bindings_that_cannot_be(refusal, binding, part):
    assert part in refusal("plan", "--gin_file", "tiny.gin", f"--gin.{binding}")


@pytest.mark.parametrize(
    ("binding", "part"),
    [
        ("BATCH_SIZE=12", "a batch of 12 in 1 microbatch(es) cannot be divided over 8 devices"),
        ("DecoderConfig.vocab_size=128", "has 259 ids, but the model only 128"),
        ("VOCABULARY='no.model'", "no.model"),
        ("TEXT_DIR='no/texts'", "no/texts"),
        ("TEXT_DIR='empty'", "empty"),
        ("MeshConfig.fsdp=5", "needs 5 devices, but 8 are at hand"),
        ("DataConfig.task='no_such_task'", "no_such_task"),
    ],
)
def test_runs_that_cannot_be_leave_nothing_behind(refusal, tmp_path, binding, part):
    (tmp_path / "empty").mkdir()
    bindings = [f"--gin.{binding}"]
    if "task" in binding:
        bindings.append("--gin.TEXT_DIR=None")
    assert part in refusal("train", "--gin_file", "tiny.gin", "--run_dir", "r", *bindings)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["plan"], "required: --gin_file; see stacking-jax plan --help"),
        (["plan", "--gin_file", "tinny.gin"], "did you mean tiny.gin"),
        (["plan", "--gin_file", "gin/experiments/dmeo.gin"], "gin/experiments/demo.gin"),
        (["plan", "--gin_file", "gin/models/tiny.gin"], "nothing sets TrainConfig"),
        (["train", "--gin_file", "tiny.gin"], "--run_dir"),
        (["train", "--gin_file", "tiny.gin", "--run_dir", "r", "--stop_at", "0"], "from 1"),
        (["train", "--gin_file", "tiny.gin", "--run_dir", "r", "--gin.TRAIN_STEPS"], "value is"),
        (["train", "--gin_file", "tiny.gin", "--run_dir", "my"], "holds no run"),
        (["trian", "--gin_file", "tiny.gin"], "invalid choice: 'trian'"),
        (["plan", "--gin_file", "tiny.gin", "--jason"], "--jason"),
        (["generate", "--run_dir", "runs/none", "--prompt", "a"], "runs/none holds no run"),
        (["generate", "--run_dir", "my", "--prompt", "a"], "my holds no run"),
        (["generate", "--run_dir", "my", "--prompt", "a", "--gin.A=1"], "no --gin bindings"),
        (["compare", "runs/none"], "runs/none does not exist"),
        (["compare", "my"], "is not a run directory"),
        ([], "required: COMMAND"),
    ],
)
def test_commands_that_cannot_be(refusal, argv, part):
    assert part in refusal(*argv)


def test_a_text_that_cannot_be_decoded_is_replaced_and_reported(run, tmp_path):
    (tmp_path / "my/texts/latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 50)
    # A folder of its own: a cache that is already there has nothing to report.
    code, _, err = run("cache", "--gin_file", "tiny.gin", '--gin.DataConfig.cache_dir="new"')
    assert code == 0 and "UTF-8" in err


def test_an_error_of_the_program_is_no_error_of_the_user(monkeypatch):
    def broken(arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_plan", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", "--gin_file", "tiny.gin"])


def test_an_interruption_is_no_traceback(run, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_plan", interrupted)
    assert run("plan", "--gin_file", "tiny.gin") == (130, "", "interrupted\n")
