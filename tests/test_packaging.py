"""What an installation holds: the stable packages, all of them, and the .gin files."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
LISTS = ["train", "data", "dev"]

# Required by a package, and left out on purpose: requirements/data.txt says why.
LEFT_OUT = {
    ("t5", "seqio-nightly"),
    ("t5", "tfds-nightly"),
    ("t5", "mesh-tensorflow"),
    ("t5", "transformers"),
    ("t5", "pandas"),
}


def read_pins(*lists: str) -> dict[str, Requirement]:
    """The pinned requirements of some lists that apply to this Python, by canonical name."""
    pins: dict[str, Requirement] = {}
    for name in lists:
        for line in (REPOSITORY / "requirements" / f"{name}.txt").read_text().splitlines():
            line = line.partition("#")[0].strip()
            if not line:
                continue
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate():
                assert canonicalize_name(pin.name) not in pins, f"{pin.name} is pinned twice"
                pins[canonicalize_name(pin.name)] = pin
    return pins


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    return specifier.version


# The pinned lists


@pytest.mark.parametrize("name", [*LISTS, "parity", "beam", "tpu", "tpu_vm", "gcs", "cuda"])
def test_every_line_is_one_exact_version(name):
    for pin in read_pins(name).values():
        assert [s.operator for s in pin.specifier] == ["=="], f"{pin} is not pinned"
        assert pin.url is None and not pin.extras
        assert "nightly" not in pin.name
    # Where packages come from is the user's business: no index, no host, no other files.
    text = (REPOSITORY / "requirements" / f"{name}.txt").read_text()
    assert not re.search(r"://|^\s*-", text, re.MULTILINE)


@pytest.mark.parametrize("lists", [["train"], ["train", "data"], LISTS], ids="+".join)
def test_the_lists_are_complete(lists):
    """Whatever a pinned package requires is pinned too, in a version that it accepts."""
    pins = read_pins(*lists)
    todo = [(name, "") for name in pins]
    seen, missing, left_out = set(todo), [], set()
    while todo:
        name, extra = todo.pop()
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate({"extra": extra}):
                continue
            key = canonicalize_name(needed.name)
            if (name, key) in LEFT_OUT:
                left_out.add((name, key))
            elif key not in pins:
                missing.append(f"{name} needs {needed}")
            elif not needed.specifier.contains(version_of(pins[key]), prereleases=True):
                missing.append(f"{name} needs {needed}, but {pins[key]} is pinned")
            for wanted in {(key, e) for e in needed.extras if key in pins} - seen:
                seen.add(wanted)
                todo.append(wanted)
    assert not missing
    assert left_out == {pair for pair in LEFT_OUT if pair[0] in pins}, "an exception is not needed"


def test_what_is_installed_is_what_is_pinned():
    installed = {name: metadata.version(name) for name in read_pins(*LISTS)}
    assert installed == {name: version_of(pin) for name, pin in read_pins(*LISTS).items()}


def test_no_nightly_package_lies_over_the_stable_ones():
    names = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions()}
    assert not names & {"seqio-nightly", "tfds-nightly"}
    owners = metadata.packages_distributions()
    assert set(owners["seqio"]) == {"seqio"}
    assert set(owners["tensorflow_datasets"]) == {"tensorflow-datasets"}


@pytest.mark.parametrize("name", ["seqio", "tensorflow-datasets"])
def test_the_files_are_those_of_the_stable_package(name):
    """A nightly that was installed and removed again would leave other contents behind."""
    modules = [
        file
        for file in metadata.distribution(name).files
        if file.suffix == ".py" and file.hash is not None
    ]
    assert len(modules) > 20
    for file in modules:
        digest = hashlib.new(file.hash.mode, file.locate().read_bytes()).digest()
        assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == file.hash.value, file


# What importing pulls in


def run_python(program: str, **options) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, **options
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TENSORFLOW = ["tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio", "t5"]


@pytest.mark.parametrize(
    "module, absent",
    [
        ("stacking_jax", ["jax", "numpy", "flax", "gin", *TENSORFLOW]),
        ("stacking_jax.gin_config", ["jax", "numpy", "flax", "gin", *TENSORFLOW]),
        ("stacking_jax.growth", ["flax", "gin", "orbax", "grain", *TENSORFLOW]),
        ("stacking_jax.models", ["gin", *TENSORFLOW]),
        ("stacking_jax.data", ["gin", *TENSORFLOW]),
        ("stacking_jax.training", TENSORFLOW),
        ("stacking_jax.evaluation.command", ["gin", *TENSORFLOW]),
        ("stacking_jax.evaluation.finetune", ["gin", *TENSORFLOW]),
        ("stacking_jax.configurables", TENSORFLOW),
    ],
)
def test_importing_does_not_pull_in(module, absent):
    """In a fresh process; and it works where what must be absent is not installed."""
    loaded = run_python(f"import sys, {module}; print(*sys.modules)", cwd=REPOSITORY).split()
    assert module in loaded
    assert not set(absent) & set(loaded)
    # A module that is None in sys.modules cannot be imported.
    hidden = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {module}"
    run_python(hidden, cwd=REPOSITORY)


def test_t5_metrics_import_without_what_is_left_out():
    program = (
        "import sys, t5.evaluation.metrics as metrics\n"
        "assert not {'mesh_tensorflow', 'transformers', 'torch', 'pandas'} & set(sys.modules)\n"
        "print(metrics.squad([['a b'], ['c']], ['a b', 'd'])['em'])"
    )
    assert float(run_python(program)) == 50.0


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing appears in the checkout; with two .gin files more."""
    source = tmp_path_factory.mktemp("source")
    for name in ("stacking_jax", "gin"):
        if (REPOSITORY / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, source)
    probe = source / "gin" / "probe"
    probe.mkdir(parents=True)
    (probe / "inner.gin").write_text("probe.width = 3\n")
    (probe / "outer.gin").write_text("include 'gin/probe/inner.gin'\nprobe.depth = 4\n")
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", out, source], check=True, capture_output=True, text=True)
    (built,) = out.glob("stacking_jax-*.whl")
    return built


def test_the_wheel_holds_the_package_and_its_gin_files(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    roots = {name.partition("/")[0] for name in names}
    # No top-level `gin`, which would lie over gin-config; no tests, no launch scripts.
    assert roots == {"stacking_jax", f"{wheel.name.partition('-py3')[0]}.dist-info"}
    shipped = {n.removeprefix("stacking_jax/gin_files/") for n in names if n.endswith(".gin")}
    ours = {p.relative_to(REPOSITORY / "gin").as_posix() for p in REPOSITORY.glob("gin/**/*.gin")}
    assert shipped == ours | {"probe/inner.gin", "probe/outer.gin"}
    shipped = {name for name in names if name.endswith(".json")}
    demonstrations = REPOSITORY.glob("stacking_jax/evaluation/demonstrations/*.json")
    assert shipped == {path.relative_to(REPOSITORY).as_posix() for path in demonstrations}
    assert "stacking_jax/evaluation/demonstrations/gsm8k_cot.json" in shipped
    modules = {name for name in names if name.endswith(".py")}
    in_checkout = {
        path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("stacking_jax/**/*.py")
    }
    assert modules == in_checkout
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_requires_the_minimum_and_accepts_the_pins(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    described = metadata.PathDistribution(zipfile.Path(archive, name.rpartition("/")[0] + "/"))
    required = [Requirement(line) for line in described.requires]
    assert {r.name for r in required if r.marker is None} == {"jax", "numpy", "optax"}
    extras = set(described.metadata.get_all("Provides-Extra"))
    assert extras == {"train", "data", "evaluation", "tpu", "gcs", "beam", "dev"}
    assert described.metadata["Requires-Python"] == ">=3.11"
    assert described.metadata["License"] == "Apache-2.0"
    (script,) = described.entry_points
    assert (script.name, script.value) == ("stacking-jax", "stacking_jax.cli:main")
    pins = read_pins(*LISTS) | {"gcsfs": read_pins("gcs")["gcsfs"]}
    for requirement in required:
        if requirement.marker is not None and requirement.marker.evaluate({"extra": "beam"}):
            if "==" in {s.operator for s in requirement.specifier}:
                # Beam holds protobuf back, and only these go together with it.
                pin = read_pins("beam")[canonicalize_name(requirement.name)]
                assert requirement.name in ("apache-beam", "protobuf", "sentencepiece")
                assert str(requirement.specifier) == str(pin.specifier)
                continue
        assert {s.operator for s in requirement.specifier} <= {">="}, "a library pins nothing"
        assert "t5" != requirement.name and "nightly" not in requirement.name
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version_of(pin)), f"{requirement}: {pin}"


def test_an_installed_wheel_finds_its_gin_files_from_any_directory(wheel, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / "bin" / "python"
    install = ["--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    (site,) = venv.glob("lib/python3*/site-packages")
    # The other packages come from this environment: the folder alone, not an editable checkout.
    others = Path(metadata.distribution("jax").locate_file("")).resolve()
    (site / "others.pth").write_text(str(others))
    program = (
        "import gin\n"
        "from stacking_jax import gin_config\n"
        "probe = gin.configurable('probe')(lambda width=0, depth=0: (width, depth))\n"
        "gin_config.load(['gin/probe/outer.gin'], ['probe.depth=5'], register=lambda: None)\n"
        "print(gin_config.__file__, gin_config.gin_root(), probe())"
    )
    done = subprocess.run(
        [python, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    package = site / "stacking_jax"
    assert done.stdout.strip() == f"{package / 'gin_config.py'} {package / 'gin_files'} (3, 5)"
    shown = subprocess.run(
        [venv / "bin" / "stacking-jax", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    assert "train" in shown.stdout


# launch/setup.sh


@pytest.fixture
def bare_machine(tmp_path):
    """Runs launch/setup.sh of a copy, with only basic commands and the given fake ones."""
    checkout, commands = tmp_path / "checkout", tmp_path / "bin"
    commands.mkdir()
    shutil.copytree(REPOSITORY / "launch", checkout / "launch")
    shutil.copytree(REPOSITORY / "requirements", checkout / "requirements")
    for command in ("bash", "dirname", "rm", "env"):
        (commands / command).symlink_to(shutil.which(command))

    def run(fakes: dict[str, str], **variables: str) -> tuple[int, str]:
        for name, script in fakes.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
            (commands / name).chmod(0o755)
        done = subprocess.run(
            ["bash", "launch/setup.sh"],
            cwd=checkout,
            env={"PATH": str(commands), "HOME": os.environ.get("HOME", "/"), **variables},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stderr

    return run


def test_setup_names_what_is_missing(bare_machine, tmp_path):
    # A command that exists and fails (a pyenv shim) or is too old is as good as none.
    code, error = bare_machine({"python3.12": "exit 127", "python3": "echo 3.8; exit 1"})
    assert (code, error.count("\n")) == (1, 1)
    assert error.startswith("error: no Python 3.11, 3.12 or 3.13 found")

    code, error = bare_machine({}, PYTHON=str(tmp_path / "nothing"))
    assert (code, error.count("\n")) == (1, 1)
    assert error.startswith(f"error: PYTHON={tmp_path}/nothing does not run")

    code, error = bare_machine({}, VIRTUAL_ENV=str(tmp_path / "gone"))
    assert (code, error.count("\n")) == (1, 1)
    assert f"the active environment {tmp_path}/gone has no Python" in error

    # The Python is right, but was packaged without the modules that make environments.
    no_venv = 'case "$2" in *ensurepip*) exit 1;; *) echo 3.12;; esac'
    code, error = bare_machine({"python3.12": no_venv})
    assert (code, error.count("\n")) == (1, 1)
    assert "apt install python3-venv" in error


def test_setup_leaves_a_folder_that_is_no_environment_alone(bare_machine, tmp_path):
    precious = tmp_path / "checkout" / ".venv" / "precious"
    precious.parent.mkdir()
    precious.write_text("")
    code, error = bare_machine({"python3.12": "echo 3.12"})
    assert code == 1
    assert "is no virtual environment; move it away first" in error
    assert precious.exists()
