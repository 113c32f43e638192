"""The launch scripts: what they print, what reaches a worker, and how a run goes on.

The commands of the clouds are stand-ins in tests/stubs, which pass words on as the real ones do.
The golden texts are what `--dry_run` prints: `python tests/test_launch.py` writes them anew.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "launch"
GUIDE = ROOT / "docs" / "launch.md"

TRAIN = ["--", "train", "--gin_file", "gin/experiments/midas_8b_prop2.gin",
         """--gin.TEXT_DIR="my texts/it's $HOME! *\"""", "--run_dir", "gs://my-bucket/runs/mine"]
TPU = ["--name", "mine", "--zone", "us-east5-a", "--accelerator", "v5p-256"]
GKE = ["--name", "mine", "--image", "IMAGE:1"]
CASES = {
    **{f"tpu_vm_{action}": ["tpu_vm.sh", action, *TPU]
       for action in ("create", "wait", "copy", "install", "logs", "stop", "delete")},
    "tpu_vm_create_slices": ["tpu_vm.sh", "create", *TPU, "--slices", "2", "--spot"],
    "tpu_vm_run": ["tpu_vm.sh", "run", *TPU, *TRAIN],
    "tpu_vm_run_newline": ["tpu_vm.sh", "run", *TPU, "--", "train", "--gin.X='a\n!b'"],
    "tpu_vm_run_evaluate": ["tpu_vm.sh", "run", *TPU, "--", "evaluate", "--tasks", "primitives"],
    "tpu_vm_resume_slices": [
        "tpu_vm.sh", "resume", *TPU, "--project", "p", "--slices", "2", "--reserved", *TRAIN
    ],
    "gke_build": ["gke.sh", "build", "--image", "IMAGE:1"],
    "gke_submit": ["gke.sh", "submit", *GKE, "--tpu", "v5p:4x4x8", *TRAIN],
    "gke_submit_slices": [
        "gke.sh", "submit", *GKE, "--tpu", "v6e:2x4", "--slices", "2", "--spot", "--limit", "3",
        "--namespace", "n", "--service_account", "s", *TRAIN,
    ],
    "gke_logs": ["gke.sh", "logs", "--name", "mine"],
    "gke_delete": ["gke.sh", "delete", "--name", "mine"],
    "slurm": ["slurm.sh", "--nodes", "4", "--time", "12:00:00", "--partition", "gpu", *TRAIN],
    "processes": ["processes.sh", "--processes", "3", "--devices", "2", *TRAIN],
}


def dry_run(line: Sequence[str], root: Path = ROOT) -> str:
    """What a script prints that it would run, without a virtual environment."""
    script, *words = line
    place = words.index("--") if "--" in words else len(words)
    words.insert(place, "--dry_run")
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", root / "launch" / script, *words], env=environment, capture_output=True,
        encoding="utf-8", timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_what_it_would_run(name):
    assert dry_run(CASES[name]) == (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def test_the_golden_texts_are_of_these_cases():
    assert {path.stem for path in GOLDEN.iterdir()} == set(CASES)


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: bash launch/setup.sh installs it")
    scripts = sorted(path.relative_to(ROOT) for path in (ROOT / "launch").glob("*.sh"))
    done = subprocess.run(
        [shellcheck, "-x", *scripts, ".ci/run"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_scripts_read_no_credentials():
    for path in (ROOT / "launch").iterdir():
        text = path.read_text(encoding="utf-8").lower()
        for word in ("credential", ".config", "token", "secret", "id_rsa", ".ssh/", "key.json"):
            text = text.replace("nothing here reads a credential", "")
            assert word not in text, f"{path.name} speaks of {word}"


@pytest.mark.parametrize(
    "line, what",
    [
        (["tpu_vm.sh"], "--name NAME --zone ZONE"),
        (["tpu_vm.sh", "fly", *TPU], "name what to do"),
        (["tpu_vm.sh", "create", "--name"], "--name needs a value"),
        (["tpu_vm.sh", "create", "--name", "a", "--zone", "z"], "--accelerator"),
        (["tpu_vm.sh", "run", *TPU], "after --"),
        (["tpu_vm.sh", "run", *TPU, "--gin_file", "x"], "come after --"),
        (["gke.sh", "submit", *GKE, "--tpu", "v5p:4x4", "--", "train"], "v5p:4x4"),
        (["slurm.sh", "--", "--run_dir", "x"], "after --"),
        (["processes.sh"], "after --"),
    ],
)
def test_mistakes_are_one_line(line, what):
    done = subprocess.run(
        ["bash", ROOT / "launch" / line[0], *line[1:]], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert what in done.stderr


# Against the stand-ins


class Cloud:
    """A checkout, a folder that stands for the cloud, and the stand-ins first on the path."""

    def __init__(self, folder: Path):
        self.checkout, self.folder = folder / "checkout", folder / "cloud"
        for name in ("launch", "requirements"):
            shutil.copytree(ROOT / name, self.checkout / name)
        for name in ("setup.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.checkout)
        self.folder.mkdir()
        here, there = folder / "bin", folder / "worker_bin"
        for path in sorted((ROOT / "tests" / "stubs").glob("*.py")):
            text = f"#!{sys.executable} -IS\n{path.read_text(encoding='utf-8')}"
            if path.stem == "python":
                self._command(there / "python3.12", text)
                self._command(self.checkout / ".venv" / "bin" / "python", text)
                self._command(self.folder / ".venv" / "bin" / "python", text)
            else:
                self._command(here / path.stem, text)
        system = "/usr/bin:/bin"
        self.environment = {
            "PATH": f"{here}:{Path(sys.executable).parent}:{system}", "CLOUD": str(self.folder),
            "WORKER_PATH": f"{there}:{system}", "HOME": str(folder),
        }

    def _command(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def run(self, script: str, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            ["bash", f"launch/{script}", *words], cwd=self.checkout, env=self.environment,
            capture_output=True, encoding="utf-8", timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def paste(self, lines: str) -> None:
        """As by hand: into an interactive bash, which also looks for `!` in its history.

        Without its line editor: without a terminal that takes bytes above 127 for keys.
        """
        done = subprocess.run(
            ["bash", "--norc", "--noprofile", "--noediting", "-i"], input=lines, cwd=self.checkout,
            env=self.environment, capture_output=True, encoding="utf-8", errors="replace",
            timeout=60, start_new_session=True,
        )
        assert done.returncode == 0, done.stderr

    def noted(self) -> list[tuple[list[str], dict[str, str]]]:
        """Arguments and JAX's variables of each stacking_jax that was run; then forgotten."""
        found = []
        for path in [*self.folder.rglob("argv"), *self.checkout.rglob("argv")]:
            found += map(json.loads, path.read_text(encoding="utf-8").splitlines())
            path.unlink()
        return found

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def codes(self, *codes: int) -> None:
        """With which codes the first worker's stacking_jax is to end, one after the other."""
        (python,) = self.folder.glob("nodes/mine/0/stacking_jax/.venv/bin")
        (python / "codes").write_text("\n".join(map(str, codes)))


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A cloud with machines on which everything is installed."""
    cloud = Cloud(tmp_path_factory.mktemp("launch"))
    for action in ("create", "wait", "copy"):
        cloud.run("tpu_vm.sh", action, *TPU)
    said = cloud.run("tpu_vm.sh", "install", *TPU)
    assert "train.txt" in said and "tpu_vm.txt" in said and "data.txt" not in said
    return cloud


SENT = {
    "tpu_vm": (["tpu_vm.sh", "run", *TPU], 2, ["--distributed", "auto"]),
    "gke": (["gke.sh", "submit", *GKE, "--tpu", "v5e:4x4"], 4, ["--distributed", "auto"]),
    "slurm": (["slurm.sh"], 2, ["--distributed", "auto"]),
    "processes": (["processes.sh"], 2, None),
}
NASTY = st.one_of(
    st.text(alphabet=" '\"$!*\\`\n\t~#&|;<>(){}[]?=%^-a1é", max_size=12),
    st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    st.sampled_from(
        ["$(HOME)", "$$", "!!", "\\n", "'\\''", "\n'", "a\n!1", "$'x'", '"a b"', "\x7f"]
    ),
)


@pytest.mark.parametrize("way", SENT)
@settings(max_examples=6, deadline=None, phases=[Phase.generate])
@given(values=st.lists(NASTY, min_size=1, max_size=6))
def test_bindings_reach_the_workers_unchanged(running, way, values):
    line, workers, added = SENT[way]
    bindings = [f"--gin.X={value}" for value in values]
    running.noted()
    printed = dry_run([*line, "--", "train", *bindings, "--run_dir", "r"], running.checkout)
    running.paste(printed)
    if way == "tpu_vm":
        for worker in range(2):
            follow(running, worker)
    noted = running.noted()
    assert len(noted) == workers
    for process, (words, known) in enumerate(sorted(noted)):
        own = added or [
            "--coordinator", "127.0.0.1:12321", "--num_processes", "2",
            "--process_id", str(process),
        ]
        assert words == ["train", *own, *bindings, "--run_dir", "r"]
        assert added or known == {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}


def follow(cloud: Cloud, worker: int) -> int:
    """Waits for the run on one worker."""
    folder = cloud.folder / "nodes" / "mine" / str(worker) / "stacking_jax"
    return subprocess.run(
        ["bash", "launch/background.sh", "follow"], cwd=folder, capture_output=True, timeout=60
    ).returncode


def test_what_is_printed_is_what_is_run(running):
    """Not pasted, but run: the same."""
    words = ["train", "--gin.X='a b'\n$HOME"]
    running.noted()
    running.run("tpu_vm.sh", "run", *TPU, "--", *words)
    running.run("tpu_vm.sh", "logs", *TPU)
    follow(running, 1)
    expected = ["train", "--distributed", "auto", "--gin.X='a b'\n$HOME"]
    assert [words for words, _ in running.noted()] == [expected, expected]


def test_a_run_goes_on_after_a_preemption_of_the_machines(cloud):
    """The first machines are taken away, the run on the second ones ends well."""
    cloud.run("tpu_vm.sh", "create", *TPU)
    (cloud.folder / "state").write_text("SUSPENDED")
    said = cloud.run("tpu_vm.sh", "resume", *TPU, "--pause", "0", *TRAIN)
    assert "mine is SUSPENDED" in said
    assert [call.split()[3] for call in cloud.calls() if "queued" in call] == [
        "create", "describe", "delete", "create", "describe",
    ]
    assert len(cloud.noted()) == 2
    # Once more: it is looked at, and nothing is done anew.
    cloud.run("tpu_vm.sh", "resume", *TPU, *TRAIN)
    assert cloud.noted() == []


def test_resume_stops_where_the_user_must_put_something_right(running):
    running.codes(2)
    running.run("tpu_vm.sh", "run", *TPU, *TRAIN)
    running.run("tpu_vm.sh", "resume", *TPU, *TRAIN, code=2)


def test_resume_starts_what_a_restart_of_the_machine_has_ended(running):
    """A run that has left no exit code; on the other worker one goes on, and is left alone."""
    running.run("tpu_vm.sh", "run", *TPU, *TRAIN)
    running.run("tpu_vm.sh", "logs", *TPU)
    follow(running, 1)
    running.noted()
    homes = sorted(running.folder.glob("nodes/mine/*/stacking_jax"))
    (homes[0] / "build/launch/code").unlink()
    alive = subprocess.Popen(["sleep", "600"])
    (homes[1] / "build/launch/pid").write_text(str(alive.pid))
    said = running.run("tpu_vm.sh", "resume", *TPU, "--pause", "0", *TRAIN)
    alive.kill()
    assert "a run is under way here" in said
    assert len(running.noted()) == 1


@pytest.mark.parametrize("code, requeued", [(0, False), (2, False), (143, True), (134, True)])
def test_slurm_queues_a_job_again_where_it_goes_on(cloud, code, requeued):
    (cloud.checkout / ".venv/bin/codes").write_text(str(code))
    cloud.run("slurm.sh", *TRAIN, code=code)
    assert (cloud.folder / "calls").exists() == requeued
    if requeued:
        assert cloud.calls() == ["scontrol requeue 7"]
        cloud.environment["SLURM_RESTART_COUNT"] = "20"
        (cloud.checkout / ".venv/bin/codes").write_text(str(code))
        cloud.run("slurm.sh", *TRAIN, code=code)
        assert len(cloud.calls()) == 1


# Again, and in the background


@pytest.mark.parametrize(
    "codes, ends_with, tries",
    [([0], 0, 1), ([2], 2, 1), ([1], 1, 1), ([143, 134, 137, 75, 0], 0, 5), ([143] * 9, 143, 6)],
)
def test_again_goes_on_after_these_codes_only(cloud, codes, ends_with, tries):
    (cloud.checkout / ".venv/bin/codes").write_text("\n".join(map(str, codes)))
    cloud.run(
        "again.sh", "--limit", "5", "--pause", "0", ".venv/bin/python", "-m", "stacking_jax",
        "train", "a b", code=ends_with,
    )
    assert [words for words, _ in cloud.noted()] == [["train", "a b"]] * tries


SAVES = "trap 'echo saved; exit 143' TERM; echo ready; while :; do sleep 0.05; done"


def test_a_signal_is_handed_on_once_and_ends_it(cloud):
    process = subprocess.Popen(
        ["bash", "launch/again.sh", "--pause", "0", "bash", "-c", SAVES], cwd=cloud.checkout,
        stdout=subprocess.PIPE, text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "saved\n"
    assert process.returncode == 143


def test_processes_end_together(cloud):
    """SIGTERM reaches all; the code is that of the first that did not end well."""
    python = cloud.checkout / ".venv" / "bin" / "python"
    python.write_text(f"#!/usr/bin/env bash\n{SAVES}\n")
    process = subprocess.Popen(
        ["bash", "launch/processes.sh", "--processes", "3", "--", "train"], cwd=cloud.checkout,
        env=cloud.environment, stdout=subprocess.PIPE, text=True,
    )
    assert [process.stdout.readline() for _ in range(3)] == ["ready\n"] * 3
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "saved\n" * 3
    assert process.returncode == 143


def test_a_run_in_the_background_is_one_is_followed_and_stops(cloud):
    cloud.run("background.sh", "start", "bash", "-c", SAVES)
    assert "under way" in cloud.run("background.sh", "start", "true", code=2)
    log = cloud.checkout / "build" / "launch" / "log"
    while "ready" not in log.read_text():
        time.sleep(0.05)
    cloud.run("background.sh", "stop")
    assert "ready\nsaved\n" in cloud.run("background.sh", "follow", code=143)
    cloud.run("background.sh", "start", "bash", "-c", "echo again; exit 2")
    assert cloud.run("background.sh", "follow", code=2).endswith("again\n")


# The guide


def guide() -> str:
    """The commands of docs/launch.md as one script, in which the launch scripts only print."""
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    with_action = r"^(bash launch/(?:tpu_vm|gke)\.sh \w+|bash launch/(?:slurm|processes)\.sh)"
    return re.sub(with_action, r"\1 --dry_run", "\n".join(blocks), flags=re.MULTILINE)


def test_the_guide_is_followed_from_the_first_line_to_the_last(cloud):
    for name in ("stacking-jax", "tensorboard", "docker", "pip", "git", "cd"):
        cloud._command(cloud.folder.parent / "bin" / name, "#!/bin/sh\n")
    script = guide()
    assert script.count("--dry_run") >= 15
    done = subprocess.run(
        ["bash", "-euo", "pipefail"], input=script, cwd=cloud.checkout, env=cloud.environment,
        capture_output=True, encoding="utf-8", timeout=120,
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    for what in ("queued-resources create", "queued-resources delete", "--node-count=",
                 "tpu-vm ssh", "kubectl create", "sbatch ", "--process_id 1"):
        assert what in printed
    # Nothing of ours was left unset, nor printed as a variable.
    assert not re.search(r"\$[A-Z]", printed)


if __name__ == "__main__":
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir(parents=True)
    for case, words in CASES.items():
        (GOLDEN / f"{case}.txt").write_text(dry_run(words), encoding="utf-8")
