"""jaxtrain.sharding.multihost: processes join, agree and share arrays; and the errors when they cannot."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain import sharding
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.sharding import initialize, multihost, rendezvous

COMMON = """
import json, os, signal, socket, sys, time
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxtrain.core.errors import InputError, RunError
from jaxtrain.sharding import multihost

def raised(kind, call):
    try:
        call()
    except kind as error:
        assert type(error) is kind, type(error)
        return str(error)
    raise AssertionError("nothing was raised")

def check_rows(order, shape, spec, n, mine):
    devices = np.array([jax.devices()[i] for i in order]).reshape(shape)
    split = NamedSharding(Mesh(devices, ("data", "model")), P(*spec))
    rows = multihost.local_rows(split, n)
    assert rows.tolist() == mine, (order, shape, me, rows)
    full = {"a": np.arange(n), "b": {"c": np.random.default_rng(0).normal(size=(n, 4, 3))}}
    local = jax.tree.map(lambda x: x[rows], full)
    for array, expected in zip(jax.tree.leaves(multihost.put_local_rows(local, split if len(spec) == 1 else
            {"a": NamedSharding(split.mesh, P("data")), "b": split}, n)), jax.tree.leaves(full)):
        assert array.shape == expected.shape and array.dtype == jax.numpy.asarray(expected).dtype
        for shard in array.addressable_shards:
            assert np.array_equal(shard.data, expected[shard.index].astype(array.dtype))
    more = np.zeros((len(rows) + 1, 4))
    assert "host data" in raised(ValueError, lambda: multihost.put_local_rows(more, split, n))
"""

TWO = """
said = []
multihost.start(auto=True, warn=said.append)
me = multihost.process_index()
assert me == int(os.environ["SLURM_PROCID"]) and multihost.process_count() == 2
assert multihost.is_process_0() == (me == 0) and said == []
assert raised(InputError, lambda: multihost.start(processes=2, process_id=me, warn=print))
try:
    socket.create_connection(("127.0.0.2", int(os.environ["JAX_COORDINATOR_PORT"])))
    raise AssertionError("JAX listens at more than the coordinator's address")
except ConnectionRefusedError:
    pass

# broadcast_from_0: any JSON, shorter and longer than a block
assert multihost.broadcast_from_0({"me": me, "bad": float("inf")}, "value") == {"me": 0, "bad": float("inf")}
base = len(json.dumps({"what": "size", "value": ""}))
for length in (4087 - base, 4088 - base, 4089 - base, 20_000):
    assert multihost.broadcast_from_0("ab"[me] * length, "size") == "a" * length
send = multihost.broadcast_from_0
message = raised(RunError, lambda: send(1, "here")) if me else send(1, "there")
assert message == 1 if me == 0 else "process 1 is at 'here' and process 0 at 'there'" in message, message

if me:
    assert "main__:" in raised(RunError, lambda: multihost.on_process_0(lambda: 1))
else:
    assert multihost.on_process_0(lambda: 2) == 2  # another line: not the same place

# on_process_0: process 0 does the work, and all raise its error
done = []
assert multihost.on_process_0(lambda: done.append(me) or ["result", me]) == ["result", 0]
assert done == [0] * (me == 0)
def fails(error):
    def work():
        raise error
    return work
assert raised(InputError, lambda: multihost.on_process_0(fails(InputError("give 8")))) == "give 8"
assert raised(RunError, lambda: multihost.on_process_0(fails(RunError("disk full")))) == "disk full"
other = raised(RunError if me else KeyError, lambda: multihost.on_process_0(fails(KeyError("k"))))
assert me == 0 or other == "process 0: KeyError: 'k'", other
other = raised(RunError if me else TypeError, lambda: multihost.on_process_0(object))
assert me == 0 or other.startswith("process 0: TypeError"), other
multihost.barrier("middle")

# StopVotes: the same result at the same call, two calls later
votes = multihost.StopVotes()
flags = [0, 0, 15, 0, 0, 2, 0, 0] if me else [0, 2, 0, 0, 0, 0, 0, 0]
assert [votes.any_process(flag) for flag in flags] == [0, 0, 0, 2, 15, 0, 0, 2]

# arrays: in order, interleaved, and with all rows in both processes
check_rows([0, 1, 2, 3], (4, 1), ["data"], 8, [[0, 1, 2, 3], [4, 5, 6, 7]][me])
check_rows([0, 2, 1, 3], (4, 1), ["data"], 8, [[0, 1, 4, 5], [2, 3, 6, 7]][me])
check_rows([0, 2, 1, 3], (2, 2), ["data"], 4, [0, 1, 2, 3])
check_rows([0, 1, 2, 3], (2, 2), ["data", "model"], 4, [[0, 1], [2, 3]][me])
check_rows([0, 2, 1, 3], (2, 2), ["data", "model"], 4, [0, 1, 2, 3])
replicated = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P())
tree = {"mine": np.full(3, float(me)), "key": jax.random.key(7), "x": jax.numpy.arange(2)}
tree = multihost.put_replicated(tree, replicated)  # it does not compare the values of "mine"
assert all(leaf.sharding == replicated for leaf in jax.tree.leaves(tree))
assert tree["mine"].dtype == np.float32 and float(tree["mine"].addressable_data(0)[0]) == me
drawn = jax.jit(jax.random.uniform, out_shardings=replicated)(tree["key"])
assert np.asarray(drawn) == np.asarray(jax.random.uniform(jax.random.key(7)))

print("checked")
sys.stdout.flush()
time.sleep(1 - me)  # JAX in process 1 ends by SIGABRT when process 0 has gone
if me == 1:
    os.kill(os.getpid(), signal.SIGTERM)  # JAX's own handler would do nothing
    time.sleep(60)
multihost.exit_process(3)
"""

THREE = """
multihost.start("127.0.0.1:" + sys.argv[2], 3, int(sys.argv[1]), warn=print)
me = multihost.process_index()
assert multihost.broadcast_from_0(me, "me") == 0
votes = multihost.StopVotes()
assert [votes.any_process(flag if me == 2 else 0) for flag in (7, 0, 0, 0)] == [0, 0, 7, 0]
# data=2, model=3 over 3 × 2 devices: the middle process holds all rows, the others half of them
check_rows(range(6), (2, 3), ["data"], 4, [[0, 1], [0, 1, 2, 3], [2, 3]][me])
print("checked")
sys.stdout.flush()
time.sleep(me == 0)  # JAX in the others ends by SIGABRT when process 0 has gone
if me == 2:
    raise KeyError("uncaught")
multihost.exit_process(4)
"""

STOPPED = """
import argparse, pathlib
from jaxtrain.cli import command_line
from jaxtrain.core.signals import Stopped
multihost.start("127.0.0.1:" + sys.argv[2], 2, int(sys.argv[1]), warn=print)
me = multihost.process_index()
multihost.barrier("the last save")
def run(args):
    if me == 0:
        time.sleep(1)
        pathlib.Path(__file__).with_name("late").touch()
    raise Stopped("stopped after step 3 of 9", 15)
parser = command_line.Parser("run", "")
code = command_line._exit_code(run, parser, argparse.Namespace(debug=False), needs_jax=False)
assert pathlib.Path(__file__).with_name("late").exists()
command_line.exit_process(code)
"""


@pytest.fixture
def port() -> int:
    """A free port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def together(tmp_path) -> Iterator[Callable[..., list[tuple[int, str, str]]]]:
    """Run a script in several processes; returns exit code, output and errors of each."""
    running: list[subprocess.Popen[str]] = []

    def run(script: str, port: int, environments: list[dict[str, str]]) -> list[tuple[int, str, str]]:
        path = tmp_path / "script.py"
        path.write_text(COMMON + script)
        for number, more in enumerate(environments):
            process = subprocess.Popen(
                [sys.executable, path, str(number), str(port)],
                env={**os.environ, "JAX_NUM_CPU_DEVICES": "2", **more},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            running.append(process)
        ended = [process.communicate(timeout=100) for process in running]
        return [(process.returncode, *texts) for process, texts in zip(running, ended, strict=True)]

    yield run
    for process in running:
        with process:
            process.kill()


@pytest.mark.full("tests/train/test_distributed.py::test_two_processes_train_as_one_device")
def test_two_slurm_processes_agree_share_arrays_and_end_by_sigterm(together, port) -> None:
    slurm = {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(port),
        "http_proxy": "http://127.0.0.1:9",  # nothing is there: process 0 is to be reached directly
    }
    each = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
    zero, one = together(TWO, port, [slurm | own for own in each])
    assert (zero[0], one[0]) == (3, -15), (zero[2], one[2])
    assert zero[1].endswith("checked\n") and one[1].endswith("checked\n")


@pytest.mark.full("tests/train/test_distributed.py::test_two_processes_train_as_one_device")
def test_three_processes_with_different_numbers_of_rows_and_an_uncaught_error(together, port) -> None:
    ended = together(THREE, port, [{}, {}, {}])  # JAX's own way out takes 5 minutes
    assert [code for code, _, _ in ended] == [4, 4, 1], ended
    assert all(out.endswith("checked\n") for _, out, _ in ended)
    assert "uncaught" in ended[2][2]


@pytest.mark.full("tests/train/test_distributed.py::test_two_processes_train_as_one_device")
def test_a_process_that_stops_waits_for_the_others(together, port) -> None:
    zero, one = together(STOPPED, port, [{}, {}])
    assert (zero[0], one[0]) == (143, 143), (zero, one)
    assert [text.count("run: stopped after step 3 of 9") for _, _, text in (zero, one)] == [1, 0]


def meeting(
    port: int, *ids: tuple[int, int], timeout: float = 20, before: Callable[[], None] = lambda: None
) -> list[Any]:
    """Call ``meet`` for each (processes, id) in threads; ``before`` runs when process 0 listens."""

    def one(person: tuple[int, int]) -> Any:
        try:
            address = rendezvous.meet(f"127.0.0.1:{port}", *person, timeout, lambda line: None)
        except (InputError, RunError) as error:
            return error
        if person[1] == 0:
            host, number = rendezvous.parse(address)
            service.enter_context(socket.create_server((host, number)))  # as JAX's coordinator does
        return address

    with contextlib.ExitStack() as service, concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(one, ids[0])
        before()
        return [first.result() if i == 0 else done for i, done in enumerate([None, *pool.map(one, ids[1:])])]


def say(port: int, data: bytes, address: str = "127.0.0.1") -> socket.socket:
    """A connection that has said ``data``, as soon as somebody listens."""
    for _ in range(500):
        with contextlib.suppress(ConnectionRefusedError):
            connection = socket.create_connection((address, port), timeout=10)
            connection.sendall(data)
            return connection
        time.sleep(0.01)
    raise AssertionError("nothing listens")


def hello(process: int, **changes: Any) -> bytes:
    who = {"jaxtrain": rendezvous.__version__, "jax": jax.__version__, "process": process, "processes": 3}
    return json.dumps(who | changes).encode() + b"\n"


def test_rendezvous_ignores_other_programs(port) -> None:
    others = []

    def before() -> None:
        for data in (
            b"",
            b"GET / HTTP/1.0\r\n\r\n",
            b"\xff" * 5000,
            b'["jaxtrain"]\n',
            b"1\n",
            b'{"jaxtrain"',
            b"[" * 2000,
        ):
            others.append(say(port, data))
        say(port, hello(1)).close()  # came, and was killed: it comes again

    assert meeting(port, (3, 0), (3, 1), (3, 2), before=before) == [f"127.0.0.1:{port}"] * 3
    for connection in others:
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        connection.close()


def test_rendezvous_at_an_ipv6_address() -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
            port = server.getsockname()[1]
    except OSError:
        pytest.skip("no IPv6 here")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        zero = pool.submit(rendezvous.meet, f"[::1]:{port}", 2, 0, 10, print)
        one = pool.submit(rendezvous.meet, f"[::1]:{port}", 2, 1, 10, print)
        assert zero.result() == f"[::1]:{port}"
        with socket.create_server(("::1", port), family=socket.AF_INET6):
            assert one.result() == f"[::1]:{port}"


def test_missing_processes_are_named_in_every_process(port) -> None:
    zero, one = meeting(port, (4, 0), (4, 1), timeout=0.5)
    assert isinstance(zero, RunError) and isinstance(one, RunError) and str(zero) == str(one)
    assert str(zero).startswith(f"processes 2, 3 of 4 have not connected to 127.0.0.1:{port} within 0.5 s: ")
    [alone] = meeting(port, (2, 1), timeout=0.3)
    assert isinstance(alone, RunError)
    assert str(alone).startswith(f"no process 0 at 127.0.0.1:{port} within 0.3 s (Connection refused): ")


def test_a_hanging_process_0_is_a_timeout(port, monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "GRACE", 0.2)
    with socket.create_server(("127.0.0.1", port)):
        [one] = meeting(port, (2, 1), timeout=0.2)
    assert isinstance(one, RunError) and str(one).startswith(f"no process 0 at 127.0.0.1:{port} within 0.2 s")


def test_a_service_that_does_not_start_is_an_error(port, monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "GRACE", 0.2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        zero, one = (pool.submit(rendezvous.meet, f"127.0.0.1:{port}", 2, i, 10, print) for i in range(2))
        assert zero.result() == f"127.0.0.1:{port}"
        with pytest.raises(RunError, match="did not start JAX's service"):
            one.result()


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([(3, 0), (2, 1)], "process 1 has --processes 2 and process 0 has 3: "),
        ([(3, 0), (3, 1), (3, 1)], "with --process-id 1: give each its own, from 0 to 2"),
    ],
    ids=["counts", "ids"],
)
def test_mismatching_processes_all_raise_the_same_error(port, ids, text) -> None:
    errors = meeting(port, *ids)
    assert len({str(error) for error in errors}) == 1 and text in str(errors[0])
    assert all(isinstance(error, InputError) for error in errors)


@pytest.mark.parametrize("name", ["jaxtrain", "jax"])
def test_a_version_mismatch_is_refused(port, name) -> None:
    answers = []

    def before() -> None:
        with say(port, hello(1, **{name: "0.0"})) as connection:
            answers.append(json.loads(connection.recv(4096)))

    [error] = meeting(port, (3, 0), before=before)
    assert isinstance(error, InputError) and f"process 1 has {name} 0.0 and process 0 has" in str(error)
    assert (answers[0]["input"], answers[0]["error"]) == (True, str(error))


def test_a_port_in_use_is_reported_by_all(port) -> None:
    with socket.create_server(("127.0.0.1", port)) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        [zero] = meeting(port, (2, 0))
        one = pool.submit(functools.partial(meeting, port, (2, 1), timeout=0.2))
        with contextlib.suppress(TimeoutError):
            server.settimeout(1)
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        [one] = one.result()
    assert isinstance(zero, InputError) and isinstance(one, RunError)
    assert str(zero).startswith(f"process 0 cannot listen at 127.0.0.1:{port} (Address already in use)")
    assert str(one).startswith(f"no process 0 at 127.0.0.1:{port} within 0.2 s (what answers there is not")


def test_process_0_listens_at_one_address_and_warns_if_it_is_public(port, monkeypatch) -> None:
    def before() -> None:
        say(port, b"").close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))

    meeting(port, (2, 0), timeout=0.3, before=before)
    warned: list[str] = []
    for number, loopback in ((0, True), (0, False), (1, False)):
        monkeypatch.setattr(
            rendezvous, "_ip", lambda _, yes=loopback: FakeNumber(is_loopback=yes, is_unspecified=False)
        )
        with pytest.raises(RunError):
            rendezvous.meet(f"127.0.0.1:{port}", 2, number, 0.1, warned.append)
    assert len(warned) == 1 and f"127.0.0.1:{port}" in warned[0] and "private network" in warned[0]


class FakeNumber:
    def __init__(self, **values: bool) -> None:
        self.__dict__ |= values


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.b:1", ("a.b", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535)), ("[::1]:80", ("::1", 80))],
)
def test_parse_addresses(text, expected) -> None:
    assert rendezvous.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", ":1", "host:0", "host:65536", "host:x", "::1:80", "[::1]", "[::1:80", "[h]:1"],
)
def test_malformed_addresses(text) -> None:
    with pytest.raises(InputError, match="write HOST:PORT"):
        rendezvous.parse(text)


def test_unusable_addresses(monkeypatch) -> None:
    def meet(coordinator: str, process_id: int = 0) -> None:
        rendezvous.meet(coordinator, 2, process_id, 0.1, print)

    for wild in ("0.0.0.0:29400", "[::]:29400"):
        with pytest.raises(InputError, match="every address of this machine"):
            meet(wild)
    with pytest.raises(
        InputError, match="give --coordinator an address of the machine on which process 0 runs"
    ):
        meet("192.0.2.1:29400")  # set aside for examples: assigned to no machine

    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for number in range(2):
        with pytest.raises(InputError, match=r"unknown host nowhere \(Name or service not known\)"):
            meet("nowhere:29400", number)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"coordinator": "h:1"}, "--processes is missing"),
        ({"process_id": 0}, "--processes is missing"),
        ({"processes": 2}, "--process-id is missing"),
        ({"processes": 2, "process_id": 2}, "--process-id 2 of --processes 2"),
        ({"processes": 2, "process_id": -1}, "--process-id -1 of --processes 2"),
        ({"processes": 0, "process_id": 0}, "--processes 0: give at least 1"),
        ({"processes": 2, "process_id": 0, "auto": True}, "--distributed auto finds the processes itself"),
        ({"processes": 2, "process_id": 0}, "already uses JAX's devices"),
    ],
)
def test_start_refuses_bad_flags(given, text) -> None:
    jax.devices()
    with pytest.raises(InputError, match=text):
        multihost.start(**given, warn=print)


def test_one_process_uses_no_network(monkeypatch, mesh8) -> None:
    monkeypatch.setattr(rendezvous, "meet", None)
    multihost.start(warn=print)
    multihost.start(processes=1, process_id=0, warn=print)
    assert (multihost.process_index(), multihost.process_count(), multihost.is_process_0()) == (0, 1, True)
    value = (1, object())
    assert (
        multihost.broadcast_from_0(value, "value") is value and multihost.on_process_0(lambda: value) is value
    )
    with pytest.raises(KeyError):
        multihost.on_process_0(lambda: {}["absent"])
    multihost.barrier("here")
    assert multihost.StopVotes().any_process(15) == 15
    assert multihost.lost_process_error(jax.errors.JaxRuntimeError("Gloo")) is None
    split = sharding.batch_split(mesh8)
    assert multihost.local_rows(split, 16).tolist() == list(range(16))
    tree = multihost.put_local_rows({"a": np.arange(16)}, split, 16)
    assert tree["a"].sharding == split and tree["a"].tolist() == list(range(16))
    key = multihost.put_replicated(jax.random.key(1), sharding.replicated(mesh8))
    assert len(key.devices()) == 8
    both = NamedSharding(mesh8, PartitionSpec(("data", "fsdp"), "model"))
    assert multihost.local_rows(both, 8).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("environment", "hint"),
    [
        ({}, "and found none: start it there"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI 5 does not say where process 0 is"),
        ({"SLURM_JOB_ID": "1"}, "srun has not started this process"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "pip install kubernetes"),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;nothing"}, "Could not parse coordinator IP address"),
    ],
    ids=["nothing", "mpi5", "slurm", "kubernetes", "broken"],
)
def test_no_cluster_detected(monkeypatch, environment, hint) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"looks for SLURM \(srun\), Open MPI 4 .* Kubernetes") as caught:
        multihost.start(auto=True, warn=print)
    assert hint in str(caught.value) and "\n" not in str(caught.value)


def test_a_jax_release_without_separate_cluster_detection(monkeypatch) -> None:
    called: list[dict[str, Any]] = []
    monkeypatch.delattr("jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params")
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: called.append(given))
    multihost.start(auto=True, timeout=7, warn=print)
    assert called == [{"initialization_timeout": 7}]


@pytest.mark.parametrize(
    ("environment", "found", "expected", "warned"),
    [
        ({}, None, None, ""),
        ({}, [3], [3], ""),
        ({"JAX_LOCAL_DEVICE_IDS": "0,1"}, [3], None, ""),
        ({"CUDA_VISIBLE_DEVICES": "3"}, [3], [0], ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1], [1], ""),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, [3], [3], ""),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, [1], [1], "--ntasks-per-node=4"),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, [0], None, ""),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "1,4"}, [0], [0], ""),
    ],
)
def test_gpus_of_a_process_in_a_cluster(monkeypatch, environment, found, expected, warned) -> None:
    for name in (
        "CUDA_VISIBLE_DEVICES",
        "JAX_LOCAL_DEVICE_IDS",
        "SLURM_GPUS_ON_NODE",
        "SLURM_STEP_TASKS_PER_NODE",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    lines: list[str] = []
    assert initialize._devices(found, 0, lines.append) == expected
    assert warned in "".join(lines) and bool(lines) == bool(warned)
    assert initialize._devices(found, 1, None) == expected  # who is not the first says nothing


def test_open_mpi_ipv6_addresses_get_brackets() -> None:
    for address, expected in (("a:1", "a:1"), ("fe80::1:80", "[fe80::1]:80"), ("[::1]:80", "[::1]:80")):
        assert initialize._bracketed(address) == expected


def test_errors_of_jax_after_another_process_has_ended(monkeypatch) -> None:
    # What JAX says on CPU devices. It does not always come: then the processes hang until JAX aborts them.
    gloo = jax.errors.JaxRuntimeError(
        "UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:20884\nmore"
    )
    assert multihost.lost_process_error(gloo) is None
    monkeypatch.setattr(multihost, "process_count", lambda: 2)

    def fails(*_: Any) -> Any:
        raise gloo

    monkeypatch.setattr(multihost, "_all_devices_max", lambda: (None, fails))
    monkeypatch.setattr(multihost, "_own_row", lambda *_: None)
    for call in (
        lambda: multihost.broadcast_from_0(1, "value"),
        lambda: multihost.StopVotes().any_process(1),
    ):
        with pytest.raises(
            RunError, match=r"^process 0: another process .* has ended .*own message$"
        ) as caught:
            call()
        assert caught.value.__cause__ is gloo
    assert multihost.lost_process_error(ValueError("Gloo")) is None
    gloo = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        multihost.barrier("here")
