"""Checkpoints: whole or not at all, and the last good one is found."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from stacking_jax.errors import UserError
from stacking_jax.models import LAYOUT
from stacking_jax.training import sharding, train
from stacking_jax.training.checkpoints import Checkpoints
from stacking_jax.training.optimizers import optimizer
from stacking_jax.training.state import TrainState, abstract_params, abstract_state

TEMPORARY = "orbax-checkpoint-tmp"


@pytest.fixture
def stopped_copy(stopped, tmp_path):
    """A run left off at step 6 of 9, to be damaged; its checkpoints are 2, 4, 6."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


@pytest.fixture(scope="module")
def shapes(config):
    """shapes(depth): the abstract state, as `train` makes it."""
    mesh = sharding.make_mesh(config.mesh)
    return lambda depth: abstract_state(
        config.model, optimizer(config.optimizer, LAYOUT), depth, mesh
    )


def state_of(abstract: TrainState, number: int) -> TrainState:
    """A state whose every number is `number`."""
    return jax.tree.map(
        lambda leaf: jax.device_put(np.full(leaf.shape, number, leaf.dtype), leaf.sharding),
        abstract,
    )


def losses(read_rows, run_dir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_rows(run_dir, "train")]


def array_files(checkpoint: Path) -> list[Path]:
    return [path for path in (checkpoint / "state").rglob("d/*") if path.is_file()]


# ---- Saving and reading back ------------------------------------------------------------


def test_what_is_saved_may_be_given_away_at_once(shapes, tmp_path):
    """A step or a growth takes the memory of a state whose save is still under way."""
    overwrite = jax.jit(
        lambda state: jax.tree.map(lambda leaf: leaf * 0 - 1, state), donate_argnums=0
    )
    checkpoints = Checkpoints(tmp_path, keep=9)
    for number in range(1, 4):
        state = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 0, state))(
            state_of(shapes(4), number)
        )
        checkpoints.save(state, {"step": number, "depth": 4})
        jax.block_until_ready(overwrite(state))
    checkpoints.wait()
    for number in range(1, 4):
        for leaf in jax.tree.leaves(checkpoints.restore(number, shapes(4))):
            assert np.all(np.asarray(leaf) == number)
    checkpoints.close()


def test_what_is_saved_comes_back_into_its_shards(tmp_path, shapes):
    abstract = shapes(2)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(abstract, 3), {"step": 7, "depth": 2, "history": [], "x": 1.5})
    checkpoints.close()

    state, meta = Checkpoints(tmp_path).restore_latest(shapes)
    assert meta == {"step": 7, "depth": 2, "history": [], "x": 1.5}
    for want, got in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
        np.testing.assert_array_equal(got, np.full(want.shape, 3, want.dtype))


def test_a_stack_of_no_layers_is_kept_and_comes_back(tmp_path, shapes):
    abstract = shapes(0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_of(abstract, 3), {"step": 7, "depth": 0})
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path)
    state, meta = checkpoints.restore_latest(shapes)
    assert meta["depth"] == 0
    params = checkpoints.restore_params(7, lambda depth: shapes(depth).params)
    for wanted, found in ((abstract, state), (abstract.params, params)):
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for want, got in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
            assert np.all(np.asarray(got) == 3)
    checkpoints.close()


def test_the_newest_are_kept_and_one_save_may_be_under_way(tmp_path, shapes):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(state_of(shapes(2), step), {"step": step, "depth": 2})
        checkpoints.steps()  # Looking must not disturb the count.
    checkpoints.wait()
    assert checkpoints.steps() == [4, 5]
    state, meta = checkpoints.restore_latest(shapes)
    assert meta["step"] == 5 and int(state.step) == 5
    assert int(checkpoints.restore(4, shapes(2)).step) == 4
    checkpoints.close()


def test_an_empty_folder_holds_nothing(tmp_path, shapes):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.steps() == [] and checkpoints.restore_latest(shapes) is None
    checkpoints.close()


def test_a_run_is_read_without_being_touched(stopped, shapes, config, snapshot):
    before = snapshot(stopped)
    reader = Checkpoints(stopped / "checkpoints", read_only=True)
    assert reader.steps() == [2, 4, 6]
    assert [reader.read_meta(step)["depth"] for step in (2, 4, 6)] == [2, 4, 4]
    mesh = sharding.make_mesh(config.mesh)
    params = reader.restore_params(2, lambda depth: abstract_params(config.model, depth, mesh))
    want = reader.restore(2, shapes(2)).params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, want))
    reader.close()
    assert snapshot(stopped) == before


def test_everything_that_is_needed_travels_together(stopped, config):
    meta = Checkpoints(stopped / "checkpoints", read_only=True).read_meta(6)
    assert (meta["step"], meta["stage"], meta["depth"]) == (6, 1, 4)
    assert meta["config"] == json.loads(json.dumps(config.to_dict()))
    assert [(stage["depth"], stage["steps"]) for stage in meta["plan"]] == [(2, 3), (4, 6)]
    assert meta["plan"][1]["grow_map"] == [0, 1, 0, 1]
    [growth] = meta["history"]
    assert growth == {
        "step": 3, "from_depth": 2, "to_depth": 4, "operator": "midas", "map": [0, 1, 0, 1],
        "init": "copy", "moments": "copy",
    }
    assert meta["counters"]["tokens"] > 0 and meta["seconds"]["step"] > 0


def test_a_checkpoint_before_a_growth_knows_nothing_of_it(stopped):
    meta = Checkpoints(stopped / "checkpoints", read_only=True).read_meta(2)
    assert meta["history"] == [] and (meta["stage"], meta["depth"]) == (0, 2)


def test_parameters_are_read_onto_another_mesh(stopped, config, change):
    reader = Checkpoints(stopped / "checkpoints", read_only=True)
    wholes = []
    for mesh in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
        made = sharding.make_mesh(change(config, mesh=mesh).mesh)
        params = reader.restore_params(
            4, functools.partial(abstract_params, config.model, mesh=made)
        )
        wholes.append(jax.device_get(params))
    assert jax.tree.all(jax.tree.map(np.array_equal, *wholes))


# ---- Damage --------------------------------------------------------------------------------


def truncate(checkpoint: Path) -> None:
    for path in array_files(checkpoint):
        os.truncate(path, path.stat().st_size // 2)


def flip(checkpoint: Path) -> None:
    for path in array_files(checkpoint):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGE = {
    "arrays cut in half": truncate,
    "a byte of the arrays changed": flip,
    "arrays gone": lambda checkpoint: [path.unlink() for path in array_files(checkpoint)],
    "array index gone": lambda checkpoint: (checkpoint / "state/manifest.ocdbt").unlink(),
    "state gone": lambda checkpoint: shutil.rmtree(checkpoint / "state"),
    "metadata gone": lambda checkpoint: (checkpoint / "meta/metadata").unlink(),
    "metadata cut": lambda checkpoint: os.truncate(checkpoint / "meta/metadata", 40),
    "metadata of another": lambda checkpoint: (checkpoint / "meta/metadata").write_text("{}"),
    "an empty folder": empty,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    damage, stopped_copy, shapes, capsys
):
    DAMAGE[damage](stopped_copy / "checkpoints/6")
    checkpoints = Checkpoints(stopped_copy / "checkpoints", keep=3)
    state, meta = checkpoints.restore_latest(shapes)
    assert meta["step"] == 4 and int(state.step) == 4
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: checkpoint 6 cannot be read (")
    assert warning.endswith("going on from checkpoint 4")
    aside = stopped_copy / "damaged_checkpoints/6"
    assert str(aside) in warning and aside.is_dir()
    assert checkpoints.steps() == [2, 4]
    checkpoints.close()


def drop_marks(checkpoint: Path) -> None:
    for path in [*checkpoint.rglob("commit_success.txt"), checkpoint / "_CHECKPOINT_METADATA"]:
        path.unlink()


def drop_manifest(checkpoint: Path) -> None:
    (checkpoint / "digests.process_0.json").unlink()


def flip_one(checkpoint: Path) -> None:
    """One bit of the largest file, where Orbax has no checksum of its own to notice."""
    largest = max(array_files(checkpoint), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 3] ^= 1
    largest.write_bytes(data)


def unneeded(checkpoint: Path) -> None:
    """A file that Orbax would not miss: it restores without."""
    os.truncate(checkpoint / "state/ocdbt.process_0/manifest.ocdbt", 0)


# What the manifest alone can see, and how the warning puts it.
UNSEEN = {
    "one bit": (flip_one, "has changed: its digest differs"),
    "an empty file": (unneeded, "manifest.ocdbt has 0 bytes instead of"),
    "a file less": (
        lambda checkpoint: (checkpoint / "state/array_metadatas/process_0").unlink(),
        "state/array_metadatas/process_0 is missing",
    ),
    "the manifest cut": (
        lambda checkpoint: os.truncate(checkpoint / "digests.process_0.json", 99),
        "in its manifest",
    ),
    "neither marks nor manifest": (
        lambda checkpoint: (drop_marks(checkpoint), drop_manifest(checkpoint)),
        "neither a manifest nor a mark of Orbax's says that it was finished",
    ),
}


@pytest.mark.parametrize("damage", UNSEEN)
def test_a_run_is_bit_equal_after_damage_that_orbax_does_not_see(
    damage, stopped_copy, config, reference, read_summary, read_rows, capsys
):
    do, words = UNSEEN[damage]
    do(stopped_copy / "checkpoints/6")
    summary = train(config, stopped_copy)
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "warning: checkpoint 6 cannot be read (" in warning and words in warning
    assert warning.endswith("going on from checkpoint 4")
    assert summary["params_digest"] == read_summary(reference)["params_digest"]
    assert losses(read_rows, stopped_copy) == losses(read_rows, reference)


def test_a_copy_without_marks_is_whole_if_its_manifest_says_so(stopped_copy, shapes, capsys):
    before = Checkpoints(stopped_copy / "checkpoints", read_only=True).restore(6, shapes(4))
    drop_marks(stopped_copy / "checkpoints/6")
    checkpoints = Checkpoints(stopped_copy / "checkpoints", keep=3)
    state, meta = checkpoints.restore_latest(shapes)
    checkpoints.close()
    assert meta["step"] == 6 and capsys.readouterr().err == ""
    assert jax.tree.all(jax.tree.map(np.array_equal, state, before))
    # Orbax needs it on gs://.
    assert (stopped_copy / "checkpoints/6/commit_success.txt").exists()


def test_a_checkpoint_of_an_older_version_is_read_on_orbax_s_word(stopped_copy, shapes, capsys):
    drop_manifest(stopped_copy / "checkpoints/6")
    checkpoints = Checkpoints(stopped_copy / "checkpoints", keep=3)
    assert checkpoints.restore_latest(shapes)[1]["step"] == 6
    checkpoints.close()
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("checkpoint 6 has no whole manifest (an older version wrote it")


def test_whoever_reads_parameters_is_told(stopped_copy, config, shapes):
    flip_one(stopped_copy / "checkpoints/4")
    params = lambda depth: shapes(depth).params  # noqa: E731
    reader = Checkpoints(stopped_copy / "checkpoints", read_only=True)
    with pytest.raises(UserError, match="checkpoint 4 of .*/checkpoints cannot be read") as caught:
        reader.restore_params(4, params)
    assert "digest differs); there are checkpoints of 2, 4, 6" in str(caught.value)
    # Sizes are as they were, and Orbax notices nothing.
    unhashed = Checkpoints(stopped_copy / "checkpoints", read_only=True, digests=False)
    unhashed.verify(4)
    reader.restore_params(6, params)


def test_a_second_damaged_checkpoint_of_a_step_is_put_beside_the_first(
    stopped_copy, shapes, capsys
):
    (stopped_copy / "damaged_checkpoints/6").mkdir(parents=True)
    empty(stopped_copy / "checkpoints/6")
    Checkpoints(stopped_copy / "checkpoints").restore_latest(shapes)
    assert str(stopped_copy / "damaged_checkpoints/6_") in capsys.readouterr().err
    assert (stopped_copy / "damaged_checkpoints/6_").is_dir()


def test_a_machine_that_is_too_small_says_nothing_against_a_checkpoint(stopped_copy, shapes):
    def too_large(depth):
        raise MemoryError(f"no room for {depth} layers")

    checkpoints = Checkpoints(stopped_copy / "checkpoints")
    with pytest.raises(MemoryError):
        checkpoints.restore_latest(too_large)
    assert checkpoints.steps() == [2, 4, 6]


def test_a_run_goes_on_from_the_last_good_checkpoint(
    stopped_copy, config, reference, read_summary, read_rows, capsys
):
    truncate(stopped_copy / "checkpoints/6")
    # What a kill in the middle of a save leaves.
    half = stopped_copy / f"checkpoints/8.{TEMPORARY}"
    shutil.copytree(stopped_copy / "checkpoints/4", half)
    shutil.rmtree(half / "meta")

    summary = train(config, stopped_copy)
    messages = capsys.readouterr().err
    assert "warning: checkpoint 8 was not finished when the run stopped; it is dropped" in messages
    assert "warning: checkpoint 6 cannot be read" in messages
    assert "going on from checkpoint 4" in messages
    assert not half.exists()
    assert summary["params_digest"] == read_summary(reference)["params_digest"]
    assert losses(read_rows, stopped_copy) == losses(read_rows, reference)


def test_a_run_whose_checkpoints_are_all_damaged_begins_again(
    stopped_copy, config, reference, read_summary, read_rows, capsys
):
    for step, damage in ((2, empty), (4, truncate), (6, DAMAGE["metadata gone"])):
        damage(stopped_copy / f"checkpoints/{step}")
    summary = train(config, stopped_copy)
    messages = capsys.readouterr().err
    for step, where in ((6, "checkpoint 4"), (4, "checkpoint 2"), (2, "the beginning")):
        assert f"warning: checkpoint {step} cannot be read" in messages
        assert f"going on from {where}" in messages
    assert summary["params_digest"] == read_summary(reference)["params_digest"]
    assert summary["tokens"] == read_summary(reference)["tokens"]
    assert [row["step"] for row in read_rows(stopped_copy, "train")] == list(range(1, 10))
    assert not read_rows(stopped_copy, "resume")


# ---- Disks and kills ----------------------------------------------------------------------


GIN = """
include 'gin/train.gin'
include 'gin/growth/midas_prop1.gin'
DecoderConfig.vocab_size = 320
DecoderConfig.num_layers = 4
DecoderConfig.d_model = 32
DecoderConfig.d_ff = 64
DecoderConfig.num_heads = 2
DataConfig.held_out = 0.1
OptimizerConfig.weight_decay = 0.1
LEARNING_RATE = 0.003
NUM_STAGES = 2
TRAIN_STEPS = 9
BATCH_SIZE = 8
SEQUENCE_LENGTH = 64
TrainConfig.log_every = 1
TrainConfig.eval_every = 4
TrainConfig.checkpoint_every = 1
"""


@pytest.fixture
def command(tmp_path, corpus):
    """The command line of the run of `config`, with a checkpoint after every step."""
    (tmp_path / "run.gin").write_text(GIN)
    return [
        "train", "--gin_file", str(tmp_path / "run.gin"), "--run_dir", str(tmp_path / "run"),
        f"--gin.TEXT_DIR={str(corpus)!r}",
    ]


def start(command, before="") -> subprocess.Popen:
    program = (
        f"import sys\n{before}\nfrom stacking_jax.cli import main\nsys.exit(main({command!r}))\n"
    )
    root = Path(__file__).resolve().parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, messages = process.communicate(timeout=300)
    return process.returncode, messages


# Files of at most 64 KiB can be written: logs can, the arrays of a checkpoint cannot.
SMALL_FILES = (
    "import resource\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))"
)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(
    stopped_copy, command, reference, read_summary, tmp_path
):
    assert stopped_copy == tmp_path / "run"
    code, messages = finish(start(command, SMALL_FILES))
    assert code == 2 and "Traceback" not in messages, messages
    *_, error = messages.splitlines()
    assert error.startswith("error: checkpoint 7 could not be written to "), messages
    assert error.endswith(
        ": File too large; the last good one is 6; make room and run the same command again"
    )

    code, messages = finish(start(command))
    assert code == 0, messages
    assert "going on from checkpoint 6" in messages
    summary = read_summary(stopped_copy)
    assert summary["params_digest"] == read_summary(reference)["params_digest"]


@pytest.mark.slow
def test_a_run_killed_while_it_saves_ends_as_if_nothing_had_been(
    command, reference, read_summary, read_rows, tmp_path
):
    """SIGKILL three times, each while a checkpoint lies half-written."""
    checkpoints = tmp_path / "run/checkpoints"
    killed = []
    for _ in range(3):
        process = start(command)
        while process.poll() is None:
            # One that no earlier kill has left, so that the save is this process's own.
            half = [path.name for path in checkpoints.glob(f"*.{TEMPORARY}*")]
            if new := set(half) - set(killed):
                process.send_signal(signal.SIGKILL)
                killed.extend(new)
            time.sleep(0.001)
        assert finish(process)[0] == -signal.SIGKILL
    assert len(killed) >= 3

    code, messages = finish(start(command))
    assert code == 0, messages
    summary = read_summary(tmp_path / "run")
    assert summary["params_digest"] == read_summary(reference)["params_digest"]
    assert losses(read_rows, tmp_path / "run") == losses(read_rows, reference)
    assert not list(checkpoints.glob(f"*.{TEMPORARY}*"))


@pytest.mark.slow
def test_sigterm_saves_and_says_so(command, reference, read_summary, tmp_path):
    process = start(command)
    metrics = tmp_path / "run/metrics.jsonl"
    rows = lambda: metrics.read_text().count("\n") if metrics.exists() else 0  # noqa: E731
    while process.poll() is None and rows() < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    code, messages = finish(process)
    assert code == 128 + signal.SIGTERM, messages
    assert "SIGTERM: saving, then stopping" in messages
    assert "the same command goes on from there" in messages.splitlines()[-1]
    code, messages = finish(start(command))
    assert code == 0 and "going on from checkpoint" in messages, messages
    summary = read_summary(tmp_path / "run")
    assert summary["params_digest"] == read_summary(reference)["params_digest"]


def test_a_failed_save_is_reported_under_its_own_step(tmp_path, shapes):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state_of(shapes(2), 1), {"step": 1, "depth": 2})
    checkpoints.wait()
    checkpoints.save(state_of(shapes(2), 2), {"step": 2, "depth": 2, "history": {object()}})
    with pytest.raises(UserError) as caught:
        checkpoints.save(state_of(shapes(2), 3), {"step": 3, "depth": 2})
    assert str(caught.value).startswith("checkpoint 2 could not be written")
    assert "the last good one is 1" in str(caught.value)
