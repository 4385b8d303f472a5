"""The hosts themselves: what a test does to one of them happens, and happens to no other."""

import os
from pathlib import Path

import pytest

from tests.hosts.machines import CTL, Hosts

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(120)]
PORT_22 = "timeout 2 bash -c '</dev/tcp/{}/22'"  # whether its sshd can be reached


@pytest.fixture
def pair(tmp_path):
    made = Hosts(tmp_path / "hosts", 2, disk="64m")
    yield made
    made.down()


def reaches(hosts: Hosts, name: str, other: str) -> bool:
    return hosts.run(name, PORT_22.format(hosts.ip(other)), check=False).returncode == 0


def test_hosts_have_names_processes_and_files_of_their_own_and_share_one_folder(pair):
    pair.run("h1", f"echo one > /tmp/own; echo one > ~/own; echo all > {pair.shared}/all")
    assert pair.run("h2", f"hostname; cat {pair.shared}/all; ls /tmp/own ~/own", check=False).stdout == "h2\nall\n"
    assert not Path("/tmp/own").exists()
    assert pair.run("h1", "cat /proc/[0-9]*/comm").stdout.split().count("sshd") == 1
    assert pair.run("h1", "touch /tmp/x " + str(Path(__file__)), check=False).returncode  # the code can only be read
    assert pair.run(CTL, "ssh -o StrictHostKeyChecking=no -i ~/.ssh/id 10.77.0.2 hostname").stdout == "h2\n"


def test_a_cut_cable_parts_one_host_until_it_is_mended(pair):
    pair.cut("h2")
    assert (reaches(pair, CTL, "h1"), reaches(pair, CTL, "h2")) == (True, False)
    pair.mend("h2")
    assert any(reaches(pair, CTL, "h2") for _ in range(5))  # the first try may be lost with what is remembered of the cut


def test_a_killed_host_loses_its_processes_and_keeps_its_disk(pair):
    running = pair.begin("h1", "echo kept > ~/kept; sleep 1000")
    while not pair.run("h1", "cat ~/kept", check=False).stdout:
        assert running.returncode is None
    pair.kill("h1")
    assert running.wait(5)
    assert not pair.is_up("h1")
    pair.start("h1")
    assert pair.run("h1", "cat ~/kept; cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout.startswith("kept\n")
    assert "sleep 1000" not in pair.run("h1", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '").stdout


def test_a_full_disk_is_full_on_one_host(pair):
    pair.fill("h1")
    assert "No space left" in pair.run("h1", "echo x > ~/x", check=False).stderr
    pair.run("h2", "echo x > ~/x")
    pair.free("h1")
    pair.run("h1", "echo x > ~/x")


def test_nothing_is_left_on_the_machine(tmp_path):
    before = Path("/proc/mounts").read_text(), os.listdir("/sys/class/net")
    made = Hosts(tmp_path / "hosts", 1)
    first = made._first("h1")
    made.down()
    assert (Path("/proc/mounts").read_text(), os.listdir("/sys/class/net")) == before
    assert not Path(f"/proc/{first}").exists()
