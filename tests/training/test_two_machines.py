"""Two machines on one host, each a network namespace, with a cable between them that can be pulled.

A downed link is what a pulled cable is: nothing arrives any more, and nobody says so. It needs root and iproute2.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import ROOT, arguments, assert_bit_equal, finish, losses, tensors, wait_for_step

pytestmark = pytest.mark.slow  # a minute and a half

CABLE = "cable"  # the name of the network device at both ends
TIMEOUT = 6  # seconds without a move, of the runs whose cable is pulled
# What may come on top: the watch looks once a second and gives the store 15 s to answer, then the launchers end.
MARGIN = 35
LONG = ["--train.steps=100", "--checkpoint.every=5", f"--timeout={TIMEOUT}"]


def ip(*words: str) -> str:
    """What it prints. Raises CalledProcessError."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Machines:
    """Two of them, number 0 and 1, with what has been started there."""

    def __init__(self) -> None:
        self.names = [f"ssl-global-{os.getpid()}-{number}" for number in range(2)]
        self.started: list[subprocess.Popen] = []

    def build(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip("link", "add", CABLE, "netns", first, "type", "veth", "peer", "name", CABLE, "netns", second)
        for number, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"10.99.0.{number + 1}/24", "dev", CABLE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", CABLE, "up")

    def remove(self) -> None:
        """All that there is by now, and what still runs there."""
        there = [name for name in self.names if (Path("/run/netns") / name).exists()]
        for name in there:
            for pid in self.at_work(name):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.communicate()
        for name in there:
            ip("netns", "delete", name)  # and its end of the cable

    def at_work(self, name: str) -> list[int]:
        """All processes on a machine, whoever started them."""
        return [int(pid) for pid in ip("netns", "pids", name).split()]

    def start(self, words: list[str]) -> list[subprocess.Popen]:
        """The same command on both. The first one has the launchers' store."""
        return [self.start_on(number, words) for number in range(2)]

    def start_on(self, number: int, words: list[str]) -> subprocess.Popen:
        # A host name of its own, as a machine has; gloo is told its device, since no name server knows that name.
        shell = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"machine-{number}"]
        launcher = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
            f"--node_rank={number}", "--master_addr=10.99.0.1", "--master_port=29400", "--rdzv-conf=timeout=60",
            "--max-restarts=0",
        ]  # fmt: skip
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": CABLE}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], *shell, *launcher, str(ROOT / "pretrain.py"), *words],
            env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def pull_the_cable(self) -> None:
        ip("-n", self.names[1], "link", "set", CABLE, "down")

    def plug_it_in(self) -> None:
        ip("-n", self.names[1], "link", "set", CABLE, "up")


@pytest.fixture(scope="module")
def machines():
    for tool in ("ip", "unshare", "hostname"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no program {tool}")
    if os.geteuid() != 0:
        pytest.skip("only root makes network namespaces")
    pair = Machines()
    try:
        try:
            pair.build()
            subprocess.run(["unshare", "--uts", "true"], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no machines can be made here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        yield pair
    finally:
        pair.remove()


def finished(processes: list[subprocess.Popen]) -> str:
    """What the first machine said, when both have come to a good end."""
    (code, out, error), (second_code, second_out, second_error) = [finish(process) for process in processes]
    assert code == 0, error[-3000:]
    assert second_code == 0, second_error[-3000:]
    assert second_out == ""  # one of them talks
    return out


@pytest.fixture(scope="module")
def whole(machines, photographs, tmp_path_factory) -> Path:
    """Both machines, never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    said = finished(machines.start(arguments("mae", photographs, out, *LONG)))
    assert "2 processes x 1 x 6 images = 12 a step" in said
    return out


def test_two_machines_equal_one_process(whole, run, tmp_path):
    one = run("mae", tmp_path / "one", *LONG)
    assert len(losses(one)) == 100
    assert losses(whole) == pytest.approx(losses(one), rel=1e-4)


def test_a_pulled_cable_ends_both_machines_and_the_run_goes_on_later(whole, machines, photographs, tmp_path):
    out = tmp_path / "run"
    words = arguments("mae", photographs, out, *LONG)
    running = machines.start(words)
    wait_for_step(running[0], out, 12)
    machines.pull_the_cable()
    pulled = time.monotonic()
    errors = []
    for process in running:
        code, _, error = finish(process, seconds=pulled + TIMEOUT + MARGIN - time.monotonic())
        assert code != 0
        assert "exitcode  : 75" in error  # of our process, as its launcher says
        errors.append(error)
    assert time.monotonic() - pulled > TIMEOUT
    who = [rf"process {number} \(machine machine-{number}, pid \d+\)" for number in range(2)]
    stuck = r"no move for \d+ s in [a-z ]+ of step \d+"
    # The store of the processes is on the first machine: that one can still read what was last heard of the other.
    assert re.search(f"error: {who[0]}: {stuck}: {who[1]} is (behind|gone), ", errors[0])
    assert re.search(f"error: {who[1]}: {stuck}: the store of the processes does not answer", errors[1])
    assert [machines.at_work(name) for name in machines.names] == [[], []]
    assert not (out / "summary.json").exists()
    machines.plug_it_in()
    assert "going on from" in finished(machines.start(words))
    assert_bit_equal(tensors(whole), tensors(out))
    assert losses(whole) == losses(out)
