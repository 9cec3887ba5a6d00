"""Several processes that compute one program together, on one machine or many: they meet, and they end together.

    with processes.joined("host0:7700", n_processes=2, process_id=0, settings={"seed": 0}):
        ...                                   # jax.devices() are now the devices of all processes

jax.distributed connects processes. But if one of them is missing or dies, it ends the others with a stack trace after a
timeout, and until then they wait in a collective operation. So the processes meet here first. Process 0 listens at the
coordinator's address; each other process connects and says who it is; when all are there and agree, process 0 tells
them where JAX will listen. The connections stay open: if a process dies, its system closes its connections, and if a
whole machine dies, TCP notices within a minute (keepalive). Then process 0 ends, and with it all others.
"""

import atexit
import contextlib
import errno
import json
import os
import select
import socket
import sys
import threading
import time

WAIT = 60  # seconds in which all processes must arrive
BEAT, PATIENCE = 5, 300  # seconds between two signs of life, and until a process that gives none is given up
ALIVE, GOODBYE = b"+", b"."
LISTENING = []  # the socket of process 0, which stays open, so that no second coordinator uses the port


def faults(coordinator, n_processes, process_id):
    """Pairs (whether these values have this fault, its message); coordinator is host:port, auto or ""."""
    alone = coordinator in ("", "auto")
    for name, value in (("n_processes", n_processes), ("process_id", process_id)):
        yield alone and value is not None, f"--{name} {value} has no effect without --coordinator host:port"
        yield not alone and value is None, f"--coordinator {coordinator} needs --{name} too"
    host, _, port = coordinator.rpartition(":")
    valid = host and port.isdecimal() and 0 < int(port) < 65536
    yield not (alone or valid), f"--coordinator {coordinator!r}: give host:port, such as localhost:7700, or auto"
    yield n_processes == 0, "--n_processes 0 is out of range: 1 or more"
    last = (n_processes or 0) - 1
    yield not alone and process_id > last, f"--process_id {process_id} is out of range: 0 to {last}"


@contextlib.contextmanager
def joined(coordinator, n_processes=None, process_id=None, settings=None):
    """Inside, JAX has the devices of all processes; yields whether this is process 0. Raises OSError if they do not all
    arrive within WAIT seconds, or differ in the settings, {name of a flag: value}. When one of them ends early, the
    others end with one line and status 1.

    With "auto", jax.distributed itself finds the other processes, as on SLURM and Kubernetes, and watches over them.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # or JAX's libraries write lines of their own when one ends
    import jax

    address, peers = None, []
    if coordinator != "auto":
        address, peers = meet(coordinator, process_id, {"n_processes": n_processes} | (settings or {}))
        threading.Thread(target=watch, args=[peers], daemon=True).start()
    waits = {"initialization_timeout": WAIT, "heartbeat_timeout_seconds": 2 * PATIENCE}
    try:
        jax.distributed.initialize(address, n_processes, process_id, **waits)
        yield jax.process_index() == 0
    except BaseException as error:
        # JAX's own exit handler would wait for the others. The last handler to be registered is the first to run.
        atexit.register(leave, 2 if isinstance(error, ValueError) else 1)
        if peers:
            time.sleep(2)  # if the reason is that another process has died, `watch` says so and ends this one
        raise
    for peer in peers:
        peer.sendall(GOODBYE)


def leave(status):
    sys.stdout.flush()
    os._exit(status)


def watch(peers):
    """Ends this process when a connection ends without a goodbye, or is silent for PATIENCE seconds. Lets the others
    hear from this process every BEAT seconds."""
    heard = dict.fromkeys(peers, time.monotonic())
    while heard:
        for peer in select.select([*heard], [], [], BEAT)[0]:
            heard[peer] = time.monotonic()
            try:
                message = peer.recv(1)
            except OSError:
                message = b""
            if message == GOODBYE:
                del heard[peer]
            elif not message:
                end("has ended")
        for peer, last in heard.items():
            if time.monotonic() - last > PATIENCE:
                end(f"has not been heard of for {PATIENCE} seconds")
            with contextlib.suppress(OSError):  # the next recv tells
                peer.sendall(ALIVE)


def end(reason):
    print(f"another process of this run {reason}: --resume goes on from the last save", file=sys.stderr)
    leave(1)


# ---- How the processes meet ----


def meet(coordinator, process_id, settings):
    """(the address where JAX will listen, this process's connections): process 0 has one to each other process."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + WAIT
    if process_id == 0:
        server = listen(host, int(port))
        peers, wrong = gather(server, settings, deadline)
        LISTENING.append(server)
        answer = {"wrong": wrong, "address": f"{host}:{free_port(host)}"}
        for peer in peers:
            send(peer, answer)
    else:
        peers = [connect(host, int(port), deadline)]
        send(peers[0], {"process_id": process_id, "settings": settings})
        answer = receive(peers[0], WAIT + 10) or {"wrong": f"the coordinator at {coordinator} has ended"}
    if answer["wrong"]:
        raise OSError(answer["wrong"])
    return answer["address"], peers


def gather(server, settings, deadline):
    """(the connections of process 0, what is wrong or "")."""
    peers, numbers = [], {0}
    while len(numbers) < settings["n_processes"]:
        server.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            peer, _ = server.accept()
        except TimeoutError:
            return peers, f"only {len(numbers)} of {settings['n_processes']} processes came within {WAIT} seconds"
        if not (hello := receive(peer, 5)):
            continue  # it was no process of ours
        keep_alive(peer)
        peers.append(peer)
        number, theirs = hello["process_id"], hello["settings"]
        if number in numbers:
            return peers, f"two processes were started with --process_id {number}"
        if differing := [name for name in settings if theirs.get(name) != settings[name]]:
            name = differing[0]
            return peers, f"--{name} is {theirs.get(name)} in process {number}, {settings[name]} in process 0"
        numbers.add(number)
    return peers, ""


def listen(host, port):
    try:
        return socket.create_server((host, port))
    except OSError as error:
        reason = "another coordinator listens there" if error.errno == errno.EADDRINUSE else error.strerror
        raise OSError(f"--coordinator {host}:{port}: {reason}") from None


def free_port(host):
    with socket.create_server((host, 0)) as server:
        return server.getsockname()[1]


def connect(host, port, deadline):
    """A connection to process 0, which may start later. Raises OSError if there is none at the deadline."""
    while True:
        try:
            peer = socket.create_connection((host, port), timeout=5)
        except OSError as error:
            if time.monotonic() > deadline:
                raise OSError(f"no coordinator at {host}:{port} within {WAIT} seconds: {error}") from None
            time.sleep(0.5)
        else:
            keep_alive(peer)
            return peer


def keep_alive(peer):
    """Has TCP ask the other machine for a sign of life after 10 silent seconds, and give it up after 40."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send(peer, message):
    peer.sendall(json.dumps(message).encode() + b"\n")


def receive(peer, seconds):
    """The next message, or None if the connection ends, or something else, or nothing comes within `seconds`."""
    peer.settimeout(seconds)
    try:
        line = b""
        while not line.endswith(b"\n"):
            if not (byte := peer.recv(1)) or len(line) > 100_000:
                return None
            line += byte
        message = json.loads(line)
    except (OSError, ValueError):
        return None
    peer.settimeout(None)
    return message if isinstance(message, dict) else None
