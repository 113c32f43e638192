"""Hosts that are about to run different things are told which, before they begin."""

from __future__ import annotations

import json

import pytest

from stacking_jax.errors import UserError
from stacking_jax.training.agreement import check_agreement, compare, facts_of, source_digest


@pytest.fixture
def facts(config):
    def of(host: str, **changes) -> dict:
        return {"host": host, **json.loads(json.dumps(facts_of(config, "d" * 64))), **changes}

    return of


def refusal(facts) -> str:
    with pytest.raises(UserError) as caught:
        compare(facts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_hosts_that_agree_go_on(facts, config, tmp_path):
    compare([facts("a"), facts("b")])
    check_agreement(config, "d" * 64, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("code", "0" * 64, "code (digest 000000000000, not "),
        ("data", "1" * 64, "data (digest 111111111111, not dddddddddddd)"),
        ("backend", "gpu", "backend: 'gpu', not 'cpu'"),
        ("XLA_FLAGS", "--a", "XLA_FLAGS: '--a', not "),
    ],
)
def test_the_host_that_differs_is_named(facts, name, value, part):
    message = refusal([facts("a"), facts("b"), facts("c", **{name: value})])
    assert message.startswith("process 2 on c differs from the others: ") and part in message


def test_the_majority_is_right_and_process_0_where_there_is_none(facts):
    other = {"data": "1" * 64}
    assert refusal([facts("a", **other), facts("b"), facts("c")]).startswith("process 0 on a ")
    assert refusal([facts("a"), facts("b", **other)]).startswith("process 1 on b ")
    message = refusal([facts("a"), facts("b", **other), facts("c"), facts("d"),
                       facts("e", code="2" * 64)])
    assert message.startswith("process 1 on b ") and "(1 more process(es) differ too)" in message


def test_settings_are_named_one_by_one(facts, config, change):
    other = facts_of(change(config, seed=7, optimizer={"clip_norm": 2.0}), "d" * 64)
    message = refusal([facts("a"), facts("b", **json.loads(json.dumps(other)))])
    assert "configuration: optimizer.clip_norm is 2.0, not 1.0, seed is 7, not 0; " in message


def test_versions_are_named_one_by_one(facts):
    versions = facts("a")["versions"] | {"jax": "0.0.1"}
    message = refusal([facts("a"), facts("b", versions=versions)])
    assert "versions: jax is '0.0.1', not " in message


def test_folders_of_a_machine_s_own_may_differ(facts, config, change):
    there = change(config, compilation_cache="/x", data={"cache_dir": "/y"})
    compare([facts("a"), facts("b", **json.loads(json.dumps(facts_of(there, "d" * 64))))])


def test_the_digest_is_of_the_package_s_source(tmp_path, monkeypatch):
    import stacking_jax

    (tmp_path / "one.py").write_text("a = 1\n")
    monkeypatch.setattr(stacking_jax, "__file__", str(tmp_path / "one.py"))
    before = source_digest()
    (tmp_path / "notes.txt").write_text("not code")
    assert source_digest() == before
    (tmp_path / "two.py").write_text("")
    after = source_digest()
    (tmp_path / "one.py").write_text("a = 2\n")
    assert len({before, after, source_digest()}) == 3
