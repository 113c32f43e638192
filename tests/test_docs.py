"""Code in the documents runs, and their commands are commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from stacking_jax import cli, configurables, gin_config
from stacking_jax.evaluation import registry
from stacking_jax.study.config import StudyConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def _cases(language):
    return [
        pytest.param(block, id=f"{page.name}-{number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, language))
    ]


def _commands():
    lines = [
        line
        for case in _cases("bash")
        for line in case.values[0].replace("\\\n", " ").splitlines()
        if line.startswith("stacking-jax ")
    ]
    assert lines, "the documents show no command"
    return sorted(set(lines))


@pytest.mark.parametrize("code", _cases("python"))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # What a page registers is forgotten with it.
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    exec(compile(code, "document", "exec", dont_inherit=True), {"__name__": "document"})  # noqa: S102


@pytest.mark.parametrize("command", _commands())
def test_commands_are_accepted(command, tmp_path, monkeypatch, capsys):
    """Commands that only read run as they stand; of the others the arguments and bindings do."""
    monkeypatch.chdir(tmp_path)
    argv = shlex.split(command, comments=True)[1:]
    if argv[0] == "plan":
        assert cli.main(argv) == 0
        assert "speed-up" in capsys.readouterr().out
        return
    bindings, rest = gin_config.split_argv(argv)
    arguments = cli._parser().parse_args(rest)
    if getattr(arguments, "gin_file", None):
        gin_config.load(arguments.gin_file, bindings, configurables.register)
        if argv[0] == "study":
            assert configurables.configured(StudyConfig).all_arms()
            return
        if argv[0] == "finetune":
            assert configurables.configured(configurables.FinetuneConfig).tasks
            return
        with gin_config.one_line_errors():
            configurables.configured().plan()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
