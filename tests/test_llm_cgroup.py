"""What memory a process may have, by its control groups and by the machine."""

import os

import pytest

from fedge.edge.llm.compute.cgroup import room_bytes

GROUPS = {
    "v2": ("0::/app/rank", "app/memory.max", "app/rank/memory.stat", "anon 100\nfile 7\n", 900),
    "v2 in a container": ("0::/gone/rank", "memory.max", "none", "", 1000),
    "v1": ("3:cpu:/\n2:memory:/job", "memory/job/memory.limit_in_bytes", "memory/job/memory.stat", "total_rss 50", 950),
    "no limit": ("0::/", "memory.max", "memory.stat", "anon 100", 4096),
}


@pytest.mark.parametrize("case", GROUPS)
def test_room_by_control_groups(tmp_path, case):
    lines, limit, stat, fields, wanted = GROUPS[case]
    (tmp_path / "cgroup").write_text(lines + "\n")
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 4 kB\n")
    for name, text in ((limit, "max" if case == "no limit" else "1000"), (stat, fields)):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    if case == "v2":  # the limit of a group counts what all below it hold
        (tmp_path / "root/app/memory.stat").write_text("anon 100\n")
    assert room_bytes(tmp_path / "cgroup", tmp_path / "root", tmp_path / "meminfo") == wanted


@pytest.mark.parametrize(
    ("raised", "room"), [(None, 300 * 4096 / 2), (ValueError("no such name"), float("inf")), (OSError(), float("inf"))]
)
def test_room_is_half_of_all_where_nobody_says_what_is_free(tmp_path, monkeypatch, raised, room):
    def sysconf(name):
        if raised:
            raise raised
        return {"SC_PHYS_PAGES": 300, "SC_PAGE_SIZE": 4096}[name]

    monkeypatch.setattr(os, "sysconf", sysconf)
    nothing = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert room_bytes(*nothing) == room
    monkeypatch.delattr(os, "sysconf")
    assert room_bytes(*nothing) == float("inf")
