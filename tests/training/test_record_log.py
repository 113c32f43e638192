"""The log of record ids: what each step was given, whoever read it."""

from __future__ import annotations

import json

import pytest

from stacking_jax.data import PackedBatches, open_cache
from stacking_jax.training import Stopped, train
from stacking_jax.training.record_log import RecordLog, read_records


@pytest.mark.slow
def test_a_run_that_goes_on_reads_what_it_would_have_read(config, change, tmp_path):
    logged = change(
        config, log_records=True, total_steps=4, eval_every=0, growth={"operator": None},
        model={"num_layers": 1},
    )
    train(logged, tmp_path / "one")
    with pytest.raises(Stopped):
        train(logged, tmp_path / "two", stop_at=3)
    train(logged, tmp_path / "two")
    records = read_records(tmp_path / "one")
    assert records == read_records(tmp_path / "two")
    assert list(records) == [1, 2, 3, 4] and {len(ids) for ids in records.values()} == {8}
    # Nothing is read twice within a pass over the records.
    size = PackedBatches(open_cache(config.data), batch_size=8).num_records
    first = [one for ids in records.values() for one in ids][:size]
    assert len(set(first)) == len(first)


def test_what_a_killed_run_wrote_after_its_checkpoint_is_dropped(tmp_path):
    for process, rows in ((0, [0, 1, 2, 3]), (1, [4, 5, 6, 7])):
        lines = [{"step": step, "rows": rows, "ids": ["a"] * 4} for step in (1, 2, 3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"records-{process}.jsonl").write_text(text + '{"step": 4, "ro')
    RecordLog(tmp_path, 2).close()
    assert read_records(tmp_path) == {1: ["a"] * 8, 2: ["a"] * 8}


def test_rows_that_are_missing_or_differ_between_processes_are_found(tmp_path):
    def write(process, rows, ids):
        line = json.dumps({"step": 1, "rows": rows, "ids": ids})
        (tmp_path / f"records-{process}.jsonl").write_text(line + "\n")

    write(0, [4], ["a"])
    with pytest.raises(ValueError, match=r"step 1: the rows \[0, 1, 2, 3\] are missing"):
        read_records(tmp_path)
    write(0, [0, 1], ["a", "b"])
    write(1, [1, 2], ["b", "c"])  # They share a row, as under `tensor`.
    assert read_records(tmp_path) == {1: ["a", "b", "c"]}
    write(1, [1, 2], ["x", "c"])
    with pytest.raises(ValueError, match="step 1: processes were given different rows 1"):
        read_records(tmp_path)
