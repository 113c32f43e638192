"""Programs made in the background are those that the run would have made, and hold nothing up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stacking_jax.training import Stopped, train
from stacking_jax.training.compile_ahead import CompileAhead, niceness

ROOT = Path(__file__).resolve().parents[2]
# Linux alone has a priority for every thread.
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority here")


def module(name: str):
    """`train` the module: the package has the function of that name."""
    return sys.modules[f"stacking_jax.training.{name}"]


# ---- The background ------------------------------------------------------------------------


def test_the_last_thing_made_is_the_result(capsys):
    ahead = CompileAhead(1, lambda: iter([None, "programs"]))
    made, seconds = ahead.take()
    assert made == "programs" and seconds >= 0 and ahead.ready
    ahead.close()
    assert capsys.readouterr().err == ""


def test_a_failure_is_one_line_and_no_more(capsys):
    def make():
        yield None
        raise RuntimeError("RESOURCE_EXHAUSTED: no room\nand a page of stacks")

    assert CompileAhead(2, make).take()[0] is None
    assert capsys.readouterr().err == (
        "warning: stage 3 could not be compiled ahead (RESOURCE_EXHAUSTED: no room); "
        "it is compiled now\n"
    )


def test_giving_up_waits_for_the_program_at_hand_alone():
    made, go_on, started = [], threading.Event(), threading.Event()

    def make():
        for program in range(3):
            started.set()
            go_on.wait(60)
            made.append(program)
            yield program

    ahead = CompileAhead(1, make)
    started.wait(60)
    closing = threading.Thread(target=ahead.close)
    closing.start()
    ahead._given_up.wait(60)
    go_on.set()
    closing.join(60)
    assert made == [0] and ahead.ready


@on_linux
def test_it_runs_at_the_lowest_priority_and_nothing_else_does():
    def nice():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine, started, go_on = nice(), threading.Event(), threading.Event()

    def make():
        first = nice()
        started.set()
        go_on.wait(60)
        yield first, nice()

    ahead = CompileAhead(1, make)
    started.wait(60)
    assert nice() == mine
    # Waited for, it is as urgent as the one that waits, where the system lets it.
    threading.Timer(0.2, go_on.set).start()
    (first, then), _ = ahead.take()
    assert first == 19 and then in ({mine} if os.geteuid() == 0 else {mine, 19})
    assert nice() == mine


@pytest.mark.parametrize(
    ("seconds_left", "needed", "nice"), [(300, 10, 19), (299, 10, 10), (80, 10, 10), (79, 10, 0)]
)
def test_short_stages_leave_it_more_of_the_machine(seconds_left, needed, nice):
    assert niceness(seconds_left, needed) == nice


@on_linux
def test_it_can_be_told_to_hurry():
    def nice():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine, started, go_on = nice(), threading.Event(), threading.Event()

    def make():
        first = nice()
        started.set()
        go_on.wait(60)
        yield first, nice()

    ahead = CompileAhead(1, make, nice=10)
    started.wait(60)
    ahead.hurry()
    go_on.set()
    (first, then), _ = ahead.take()
    low = min(mine + 10, 19)
    assert first == low and then in ({mine} if os.geteuid() == 0 else {mine, low})


@on_linux
def test_xlas_compiling_threads_have_the_lowest_priority_too():
    """Those that are busy in a compilation are those that were found; they are low meanwhile."""
    program = """
import os, threading
import jax, jax.numpy as jnp
from stacking_jax.training import compile_ahead

def seconds():
    found = {}
    for name in os.listdir("/proc/self/task"):
        text = open(f"/proc/self/task/{name}/stat").read()
        fields = text[text.rindex(")") + 2:].split()
        found[int(name)] = int(fields[11]) + int(fields[12])
    return found

def nice(threads):
    return {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads}

jax.config.update("jax_enable_compilation_cache", False)
compile_ahead.find_compiler_threads()
found, base = compile_ahead._compiler_threads, nice([os.getpid()])
x = jnp.ones((64, 64))
before = seconds()
step = jax.jit(lambda x: sum(jnp.tanh(x @ x + i) for i in range(30))).lower(x).compile()
compiling = {thread: ticks - before.get(thread, 0) for thread, ticks in seconds().items()}
print(2 * sum(compiling[thread] for thread in found) >= sum(compiling.values()) / 2 > 0)
before = seconds()
for _ in range(2000):
    jax.block_until_ready(step(x))
running = {thread: ticks - before.get(thread, 0) for thread, ticks in seconds().items()}
print(20 * sum(running[thread] for thread in found) <= sum(running.values()))
print(nice(found) == base)
ahead = compile_ahead.CompileAhead(1, lambda: iter([nice(found)]))
print(ahead.take()[0] == {19}, os.geteuid() != 0 or nice(found) == base)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["True"] * 5, (done.stdout, done.stderr)


# ---- Whole runs ----------------------------------------------------------------------------


def test_the_second_stage_is_not_compiled_in_its_turn(
    config, tmp_path, reference, monkeypatch, read_summary, read_rows
):
    in_turn = []
    compile_stage = module("train").compile_stage

    def watched(config, plan, stage, *rest):
        in_turn.append(stage.depth)
        return compile_stage(config, plan, stage, *rest)

    monkeypatch.setattr(module("train"), "compile_stage", watched)
    summary = train(config, tmp_path / "run")
    assert in_turn == [2]
    assert summary["params_digest"] == read_summary(reference)["params_digest"]
    first, second = summary["stages"]
    assert first["compile_ahead_seconds"] == 0 < second["compile_ahead_seconds"]
    assert summary["goodput"]["compile_ahead_seconds"] == second["compile_ahead_seconds"]
    [grow] = read_rows(tmp_path / "run", "grow")
    assert grow["compile_ahead_seconds"] == second["compile_ahead_seconds"]
    assert grow["compile_seconds"] == second["compile_seconds"]


def test_without_it_the_bits_are_the_same(config, change, tmp_path, reference, read_summary):
    summary = train(change(config, compile_ahead=False), tmp_path / "run")
    assert summary["params_digest"] == read_summary(reference)["params_digest"]
    assert [stage["compile_ahead_seconds"] for stage in summary["stages"]] == [0, 0]


def test_a_failure_in_it_costs_no_more_than_time(
    config, tmp_path, reference, monkeypatch, read_summary, capsys
):
    def fail(*arguments, **options):
        raise MemoryError("no room to compile in")

    monkeypatch.setattr(module("train"), "compile_in_turn", fail)
    summary = train(config, tmp_path / "run")
    assert summary["params_digest"] == read_summary(reference)["params_digest"]
    assert capsys.readouterr().err.count(
        "warning: stage 2 could not be compiled ahead (no room to compile in); it is compiled now"
    ) == 1


@pytest.mark.slow
def test_a_run_that_is_stopped_meanwhile_leaves_no_thread_and_goes_on(
    config, tmp_path, reference, monkeypatch, read_summary
):
    compile_in_turn, told = module("train").compile_in_turn, []

    def tell_and_compile(*arguments, **options):
        told.append(os.kill(os.getpid(), signal.SIGTERM))
        yield from compile_in_turn(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module("train"), "compile_in_turn", tell_and_compile)
        with pytest.raises(Stopped) as caught:
            train(config, tmp_path / "run")
    assert len(told) == 1 and caught.value.signal_number == signal.SIGTERM
    assert "compile-ahead" not in {thread.name for thread in threading.enumerate()}
    summary = train(config, tmp_path / "run")
    assert summary["params_digest"] == read_summary(reference)["params_digest"]
