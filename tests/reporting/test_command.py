from __future__ import annotations

import json
import subprocess
import sys

import pytest

from stacking_jax.errors import UserError
from stacking_jax.reporting import compare


def test_the_table_is_printed_and_the_report_written(demo_runs, tmp_path, capsys):
    out = tmp_path / "report.html"
    comparison = compare([str(path) for path in demo_runs], str(out))
    printed, noticed = capsys.readouterr()
    assert len(comparison.rows) == 3
    assert "MIDAS PROP-2" in printed and "129 TFLOP" in printed
    assert str(out) in noticed and str(out) not in printed
    page = out.read_text(encoding="utf-8")
    assert "stacking-jax compare" in page and f"--out {out}" in page


def test_without_out_no_file_is_written(demo_runs, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    compare(demo_runs)
    assert sorted(tmp_path.rglob("*")) == before
    assert "held-out" in capsys.readouterr().out


def test_json_is_one_object_and_nothing_else(demo_runs, capsys):
    compare([str(path) for path in demo_runs], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [row["steps"] for row in found["rows"]] == [300, 300, 251]
    assert found["rows"][0]["speedup_reference"] == "full depth, equal steps"


def test_an_error_comes_before_any_output(demo_runs, tmp_path, capsys):
    with pytest.raises(UserError, match="does not exist"):
        compare([str(demo_runs[0]), str(tmp_path / "nowhere")], str(tmp_path / "report.html"))
    assert capsys.readouterr().out == "" and not (tmp_path / "report.html").exists()


def test_importing_is_cheap():
    code = (
        "import sys, stacking_jax.reporting;"
        "heavy = {'matplotlib', 'rich', 'jax', 'flax', 'tensorflow', 'numpy', 'gin'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_report_needs_neither_jax_nor_pyplot(demo_runs, tmp_path):
    code = (
        "import sys; from stacking_jax.reporting import compare;"
        f"compare({[str(path) for path in demo_runs]!r}, {str(tmp_path / 'r.html')!r});"
        "heavy = {'jax', 'flax', 'tensorflow', 'gin', 'matplotlib.pyplot'};"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip().endswith("loaded: []")
