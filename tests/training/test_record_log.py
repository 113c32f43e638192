"""The log of record ids: what each step was given, whoever read it."""

from __future__ import annotations

import json

import pytest

from stacking_jax.data import PackedBatches, open_cache
from stacking_jax.training import Stopped, train
from stacking_jax.training.record_log import RecordLog, read_records


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
    for process, first in ((0, 0), (1, 4)):
        lines = [{"step": step, "first_row": first, "ids": ["a"] * 4} for step in (1, 2, 3)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"records-{process}.jsonl").write_text(text + '{"step": 4, "fir')
    RecordLog(tmp_path, 2).close()
    assert read_records(tmp_path) == {1: ["a"] * 8, 2: ["a"] * 8}


def test_rows_that_are_missing_or_twice_are_found(tmp_path):
    path = tmp_path / "records-0.jsonl"
    path.write_text('{"step": 1, "first_row": 4, "ids": ["a"]}\n')
    with pytest.raises(ValueError, match="step 1: rows from 0 on are missing or read twice"):
        read_records(tmp_path)
    path.write_text('{"step": 1, "first_row": 0, "ids": ["a"]}\n' * 2)
    with pytest.raises(ValueError, match="missing or read twice"):
        read_records(tmp_path)
