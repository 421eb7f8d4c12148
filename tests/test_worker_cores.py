"""Threads: the cores we may use, divided by the workers of this host."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from worker.cores import CoreShare, count_cores, read_boot_id, share_cores
from worker.settings import WorkerSettings


def test_workers_of_one_host_share_its_cores_and_others_do_not_count() -> None:
    assert share_cores(12, "here", [], least=1) == 12
    assert share_cores(12, "here", ["here", "there", "here"], least=1) == 4
    assert share_cores(12, "here", ["there"], least=4) == 3
    assert share_cores(2, "here", ["here"] * 5, least=1) == 1
    assert share_cores(8, "", ["", ""], least=1) == 8


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "9900000 100000"}, None),
    ],
)
def test_a_containers_quota_bounds_the_cores(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")

    assert count_cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))


def test_an_engine_is_told_when_its_share_changes_and_only_then() -> None:
    others: list[str] = []
    told: list[int | None] = []
    share = CoreShare(lambda: others, least=1)
    for count in (0, 0, count_cores() - 1, count_cores() - 1):
        others[:] = [read_boot_id()] * count
        told.append(share.adjust())

    assert told == [count_cores(), None, *([None] if count_cores() == 1 else [1]), None]
    assert share.threads == 1


def test_threads_that_somebody_chose_stay() -> None:
    share = CoreShare(lambda: [read_boot_id()] * 99, least=1, fixed=7)

    assert share.adjust() is None
    assert share.threads == 7


def test_the_boot_id_names_this_host() -> None:
    assert read_boot_id() == read_boot_id() != ""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("engine", "jax"),
        ("workers", 0),
        ("drain_seconds", -1.0),
        ("stall_seconds", -1),
        ("stall_seconds", 86_401),
        ("publish_seconds", -0.001),
        ("publish_seconds", 60.1),
        ("publish_seconds", float("nan")),
        ("publish_unread_seconds", -0.001),
        ("publish_unread_seconds", 60.1),
        ("dtype", "int4"),
        ("kv_dtype", "fp8"),
        ("lease_seconds", float("nan")),
    ],
)
def test_a_setting_out_of_its_bound_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field}: must be"):
        WorkerSettings(**{field: value})  # type: ignore[arg-type]


def test_keys_in_eight_bits_are_not_asked_of_vllm_by_a_setting_that_it_does_not_read() -> None:
    with pytest.raises(ValueError, match="kv_dtype: is for engine torch"):
        WorkerSettings(engine="vllm", kv_dtype="int8")
