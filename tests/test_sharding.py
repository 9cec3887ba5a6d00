"""Many devices, made of a CPU in a process of its own, compute what one device computes; two processes likewise."""

import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, STORIES, oracle, random_params

from backends import processes
from training import data, saves, train
from training.model import llama_hparams
from weights.params import leaf_name, param_shapes, shapes_of

jax = oracle("jax")
sharding = pytest.importorskip("backends.sharding")

P = jax.sharding.PartitionSpec
HPARAMS = {"n_vocab": 101, "n_ctx": 8, "n_embd": 24, "n_head": 6, "n_layer": 1}
SHORT = {"model": "", "hparams": HPARAMS, "n_steps": 2, "batch_size": 8, "n_ctx": 8}
LLAMAS = ("tied_gqa", "untied_mha")
MESHES = ["data=8", "fsdp=8", "model=2", "model=3", "model=6", "data=2,model=2"]


def on_devices(*tasks, n_devices=8):
    """The results of on_devices.py for these tasks."""
    words = [sys.executable, "tests/on_devices.py", json.dumps({"n_devices": n_devices, "tasks": tasks})]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results():
    training = SHORT | {"do": "train", "dtype": "float64", "meshes": ["data=2", "data=2,fsdp=2,model=2"]}
    return on_devices(training, {"do": "infer", "models": {"golden": str(GOLDEN)}, "meshes": ["data=2,model=2"]})


# ---- Training and inference, on many devices and on one ----


def test_training_is_that_of_one_device(results):
    for mesh, found in results[0].items():
        assert found["loss"] <= 1e-9, mesh  # two steps, with dropout, micro-batches and clipping; then an evaluation
        assert found["params"] <= 1e-9, mesh


def test_data_parallelism_moves_nothing_but_the_gradients(results):
    assert results[0]["data=2"]["collectives"] == {"all-reduce": 1}  # XLA makes one of those of all parameters
    assert results[0]["data=2"]["n_cut"] == 0


def test_a_device_has_its_share_of_the_parameters_and_of_the_optimizer(results):
    assert results[0]["data=2,fsdp=2,model=2"]["share"] <= 1.05 / 4 * 1.1  # vectors are cut by one of the two axes


def test_inference_is_that_of_one_device(results):
    ((_, found),) = results[1].items()
    assert found["logits"] <= 2e-5
    assert found["same ids"]  # of one text, and of three in four slots
    assert found["heads"] == 2  # of 4, in the cache


def test_a_forward_pass_has_two_all_reduces_a_block_one_for_the_embedding_and_one_gather(results):
    ((_, found),) = results[1].items()
    assert found["collectives"] == {"all-reduce": 2 * 3 + 1, "all-gather": 1}  # the golden model has 3 layers


# ---- What is cut where ----


def backend(params, n_head=6, **sizes):
    mesh = SimpleNamespace(shape=dict.fromkeys(sharding.AXES, 1) | sizes)
    return sharding.Backend(mesh, params, {"n_head": n_head})


def specs(shapes, n_head=6, **sizes):
    """{name: where it is cut} of parameters {name: shape}, of those that are cut."""
    leaves = {name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}
    return {name: cut.spec() for name, cut in backend(leaves, n_head, **sizes).cuts.items() if cut.spec() != P()}


def test_tensor_parallelism_is_that_of_megatron():
    shapes = {leaf_name(path): shape for path, shape in param_shapes(**HPARAMS).items()}
    block = "blocks.0"
    assert specs(shapes, model=2) == {
        "wte": P("model"),
        f"{block}.attn.c_attn.w": P(None, "model"),
        f"{block}.attn.c_attn.b": P("model"),
        f"{block}.attn.c_proj.w": P("model"),
        f"{block}.mlp.c_fc.w": P(None, "model"),
        f"{block}.mlp.c_fc.b": P("model"),
        f"{block}.mlp.c_proj.w": P("model"),
    }


def test_a_llama_is_cut_alike():
    hparams = llama_hparams(n_vocab=50, n_ctx=8, n_embd=24, n_head=6, n_layer=1, n_head_kv=2) | {"tied": False}
    block, columns = "blocks.0", P(None, "model")
    expected = {"wte": P("model"), "lm_head": P("model"), f"{block}.attn.c_proj.w": P("model")}
    expected |= {f"{block}.attn.c_{name}.w": columns for name in "qkv"} | {f"{block}.mlp.c_down.w": P("model")}
    expected |= {f"{block}.mlp.c_{name}.w": columns for name in ("gate", "up")}
    assert specs({leaf_name(path): shape for path, shape in shapes_of(hparams).items()}, model=2) == expected
    with pytest.raises(ValueError, match=r"model=4 does not divide the 2 heads: choose 1, 2$"):
        sharding.Backend(SimpleNamespace(shape={"data": 1, "fsdp": 1, "model": 4}), {}, hparams)


def test_fsdp_cuts_the_longest_axis_that_it_divides():
    shapes = {"wte": (101, 24), "x.c_fc.w": (24, 96), "x.c_fc.b": (96,), "odd": (3, 5), "g": (24,)}
    expected = {"wte": P(None, "fsdp"), "x.c_fc.w": P(None, "fsdp"), "x.c_fc.b": P("fsdp"), "g": P("fsdp")}
    assert specs(shapes, fsdp=8) == expected
    both = specs(shapes, fsdp=2, model=2)
    assert both["x.c_fc.w"] == P("fsdp", "model")
    assert both["wte"] == P("model", "fsdp")


def test_a_device_gets_the_columns_of_its_own_heads():
    n_head, d_head, n_devices = 6, 4, 3
    names = [f"{part}{head}.{i}" for part in "qkv" for head in range(n_head) for i in range(d_head)]
    arranged = sharding.swap_columns(np.array([names, names]), 3, n_devices)
    for device, columns in enumerate(np.split(arranged[1], n_devices)):
        heads = range(device * 2, device * 2 + 2)
        assert [*columns] == [f"{part}{head}.{i}" for part in "qkv" for head in heads for i in range(d_head)]
    assert [*sharding.swap_columns(arranged, n_devices, 3)[0]] == names


def bytes_of_a_device(size, **sizes):
    """Of a parameter, its gradient and AdamW's two averages, 4 bytes each, by the table of cuts."""
    n_embd, n_head, n_layer = {"124M": (768, 12, 12), "1558M": (1600, 25, 48)}[size]
    shapes = {leaf_name(path): shape for path, shape in param_shapes(50257, 1024, n_embd, n_head, n_layer).items()}
    cuts, n = specs(shapes, n_head, **sizes), 0
    for name, shape in shapes.items():
        parts = [sizes.get(axis, 1) for axis in (*cuts.get(name, ()), *[None] * len(shape))]
        n += math.prod(-(-length // part) for length, part in zip(shape, parts, strict=False))
    return 16 * n


def test_the_page_on_scaling_has_these_numbers_of_bytes():
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:one device|\w+=)[^|]*) \| ([\d.]*) ?\| ([\d.]*) ?\|$", page, flags=re.MULTILINE)
    assert len(rows) == 7
    for mesh, *cells in rows:
        sizes = {name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", mesh)}
        for size, cell in zip(("124M", "1558M"), cells, strict=True):
            assert not cell or cell == f"{bytes_of_a_device(size, **sizes) / 1e9:.2f}", (mesh, size)


# ---- Mistakes: one line each ----


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("rows=2", "'rows=2' is not data=N, fsdp=N or model=N"),
        ("data", "'data' is not"),
        ("data=0", "'data=0' is not"),
        ("data=1,data=1", "'data=1' is not"),
        ("data=two", "'data=two' is not"),
        ("model=3", "--mesh model=3 has 3 devices, JAX finds 1: choose 1; XLA_FLAGS="),
    ],
)
def test_a_mesh_that_the_devices_do_not_make(mesh, message, command):
    status, out, err = command("Tom", "--model_size", "3M", "--backend", "jax", "--mesh", mesh)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_the_values_that_divide_the_devices_and_the_heads(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform="gpu")] * 8)
    with pytest.raises(ValueError, match=r"has 3 devices, JAX finds 8: choose 1, 2, 4, 8$"):
        sharding.make_mesh("data=3")
    with pytest.raises(ValueError, match=r"model=4 does not divide the 6 heads: choose 1, 2, 3, 6$"):
        backend(random_params(), model=4)
    with pytest.raises(ValueError, match=r"model=3 does not divide the 16 columns of blocks\.0\.mlp\.c_gate\.w"):
        specs({"blocks.0.mlp.c_gate.w": (8, 16)}, model=3)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="--mesh data=4 has 4 devices: 2 processes need all of theirs, 8"):
        sharding.make_mesh("data=4")


def test_numpy_has_no_mesh(command):
    status, _, err = command("Tom", "--model_size", "3M", "--mesh", "model=2")
    assert (status, err) == (2, "--mesh model=2 needs --backend jax: NumPy computes on one device\n")


def test_fsdp_is_for_training():
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 2, "model": 1})
    model = SimpleNamespace(params=random_params(), init_cache=functools.partial(print, n_head=2))
    with pytest.raises(ValueError, match="--mesh fsdp divides training: choose data and model"):
        sharding.spread(model, None, mesh)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh", "data=2", "--backend", "numpy"], "--mesh data=2 needs --backend jax"),
        (["--mesh", "data=2"], "--mesh data=2 has 2 devices, JAX finds 1"),
        (["--coordinator", "a:1", "--backend", "numpy"], "--coordinator a:1 needs --backend jax"),
        (["--coordinator", "a:1"], "--coordinator a:1 needs --n_processes too"),
        (["--coordinator", "a:1", "--n_processes", "2"], "--coordinator a:1 needs --process_id too"),
        (["--n_processes", "2"], "--n_processes 2 has no effect without --coordinator host:port"),
        (["--coordinator", "auto", "--process_id", "0"], "--process_id 0 has no effect without"),
        (["--coordinator", "a", "--n_processes", "2", "--process_id", "0"], "--coordinator 'a': give host:port"),
        (["--coordinator", "a:1", "--n_processes", "2", "--process_id", "2"], "--process_id 2 is out of range: 0 to 1"),
        (["--coordinator", "a:1", "--n_processes", "0", "--process_id", "0"], "--n_processes 0 is out of range"),
    ],
)
def test_flags_of_training_that_do_not_fit(flags, message, command, ids, tmp_path):
    status, out, err = command(str(ids), "--out", str(tmp_path / "run"), *flags, main=train.main)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]


# ---- Processes that meet ----


def port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def meeting(monkeypatch, *settings, numbers=None, wait=2):
    """What processes.meet returns, or raises, in a thread for each of the settings: a list."""
    monkeypatch.setattr(processes, "WAIT", wait)
    address, found = f"localhost:{port()}", [None] * len(settings)

    def process(i):
        number = (numbers or range(len(settings)))[i]
        try:
            found[i] = processes.meet(address, number, settings[i])
        except OSError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=process, args=[i]) for i in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_meet_and_agree_on_an_address(monkeypatch):
    found = meeting(monkeypatch, *[{"n_processes": 3, "seed": 5}] * 3)
    assert len({address for address, _ in found}) == 1
    assert [len(peers) for _, peers in found] == [2, 1, 1]


def test_processes_that_do_not_fit_are_told_so(monkeypatch):
    two, three = {"n_processes": 2, "seed": 1}, {"n_processes": 3, "seed": 1}
    assert meeting(monkeypatch, two, three) == ["--n_processes is 3 in process 1, 2 in process 0"] * 2
    assert meeting(monkeypatch, two, two | {"seed": 7}) == ["--seed is 7 in process 1, 1 in process 0"] * 2
    assert (
        meeting(monkeypatch, three, three, three, numbers=[0, 1, 1])
        == ["two processes were started with --process_id 1"] * 3
    )


def test_a_process_that_is_missing_ends_the_waiting(monkeypatch):
    settings = {"n_processes": 3}
    expected = "only 2 of 3 processes came within 1 seconds"
    assert meeting(monkeypatch, settings, settings, wait=1) == [expected] * 2
    (alone,) = meeting(monkeypatch, settings, numbers=[1], wait=1)
    assert alone.startswith("no coordinator at localhost:")
    assert "within 1 seconds" in alone


def test_two_coordinators_cannot_use_one_port():
    with socket.create_server(("localhost", 0)) as server, pytest.raises(OSError, match="another coordinator listens"):
        processes.meet(f"localhost:{server.getsockname()[1]}", 0, {"n_processes": 2})


def test_a_stranger_at_the_port_is_ignored(monkeypatch):
    server = processes.listen("localhost", port())
    stranger = socket.create_connection(server.getsockname())
    stranger.sendall(b"GET / HTTP/1.1\n")
    peers, wrong = processes.gather(server, {"n_processes": 2}, time.monotonic() + 0.2)
    assert (peers, wrong) == ([], "only 1 of 2 processes came within 60 seconds")


# ---- Two processes that train one model ----

TINY = "--n_layer 1 --n_head 2 --n_embd 16 --n_ctx 16 --batch_size 8 --warmup 2 --dropout 0.2 --learning_rate 0.01"
TINY = [*TINY.split(), "--backend", "jax", "--eval_every", "2"]


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.main(str(STORIES), out=str(folder / "ids"), encoder=str(GOLDEN))
    return folder / "ids"


@pytest.fixture(scope="module")
def whole(ids, tmp_path_factory):
    """The folder of a run of four steps on one device."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    flags = dict(zip([flag[2:] for flag in TINY[::2]], TINY[1::2], strict=True))
    flags = {name: json.loads(value) if value[0].isdigit() else value for name, value in flags.items()}
    train.main(str(ids), out=str(folder), n_steps=4, **flags)
    return folder


def launch(ids, out, n_devices, *flags):
    """A training process with n_devices devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={n_devices}"
    words = [sys.executable, "-m", "training.train", str(ids), "--out", str(out), *TINY, *flags]
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def launch_two(ids, out, n_devices, *flags):
    """Two processes, with n_devices devices each, that train one model."""
    together = ["--coordinator", f"localhost:{port()}", "--n_processes", "2"]
    return [launch(ids, out, n_devices, *together, "--process_id", str(i), *flags) for i in range(2)]


def halved(whole, folder):
    """A copy of the run, as if it had been stopped after two steps."""
    shutil.copytree(whole, folder)
    (folder / "training-4.npz").unlink()
    return folder


def assert_same_losses(folder, whole):
    for found, expected in zip(saves.read_metrics(folder), saves.read_metrics(whole), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_run_of_one_device_goes_on_in_two_processes(ids, whole, tmp_path):
    folder = halved(whole, tmp_path / "run")
    both = launch_two(ids, folder, 1, "--resume", "--n_steps", "4")
    (out, err), (out_1, err_1) = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], err + err_1
    assert "step     4" in out
    assert "step" not in out_1
    assert_same_losses(folder, whole)


@pytest.mark.trial
def test_a_run_goes_on_elsewhere(ids, tmp_path):
    """Stopped on data=8; resumed on one device, and on two processes of four devices."""
    process = launch(ids, tmp_path / "whole", 8, "--mesh", "data=8", "--n_steps", "4")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    for name, n_devices in (("one", 1), ("two", 4)):
        folder = halved(tmp_path / "whole", tmp_path / name)
        start = launch_two if name == "two" else lambda *a: [launch(*a)]
        for process in start(ids, folder, n_devices, "--resume", "--n_steps", "4"):
            _, err = process.communicate(timeout=600)
            assert process.returncode == 0, err
        assert_same_losses(folder, tmp_path / "whole")


@pytest.mark.trial
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_ends_the_other(ids, tmp_path, victim):
    folder = tmp_path / "run"
    both = launch_two(ids, folder, 2, "--n_steps", "100000")
    while not (folder / "training-4.npz").exists() and both[0].poll() is both[1].poll() is None:
        time.sleep(0.1)
    both[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, err = both[1 - victim].communicate(timeout=60)
    assert both[1 - victim].returncode == 1
    print(f"ended after {time.monotonic() - killed:.1f} seconds")
    assert [line for line in err.splitlines() if not line.startswith("JAX ")] == [
        "another process of this run has ended: --resume goes on from the last save"
    ]
    step = saves.saved_steps(folder)[-1]
    both = launch_two(ids, folder, 2, "--n_steps", str(step + 4), "--resume")
    for process in both:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    assert saves.saved_steps(folder)[-1] == step + 4


# ---- The full lengths ----


@pytest.mark.trial
@pytest.mark.parametrize(("dtype", "n_steps", "bar"), [("float64", 100, 1e-9), ("float32", 10, 1e-5)])
def test_the_embedded_model_trains_alike_on_every_mesh(dtype, n_steps, bar):
    task = {"do": "train", "model": "3M", "dtype": dtype, "n_steps": n_steps, "batch_size": 8, "n_ctx": 32}
    (found,) = on_devices(task | {"meshes": MESHES}, n_devices=24)
    for mesh, one in found.items():
        print(mesh, dtype, f"loss {one['loss']:.1e}, params {one['params']:.1e}, share {one['share']:.4f}")
        n = {"data=8": 1, "fsdp=8": 8, "data=2,model=2": 2}.get(mesh) or int(mesh[-1])
        assert one["share"] <= 1.05 / n
        assert one["loss"] <= bar
        assert dtype == "float32" or one["params"] <= bar


@pytest.mark.trial
def test_a_llama_trains_alike_on_every_mesh():
    hparams = llama_hparams(n_vocab=101, n_ctx=16, n_embd=48, n_head=6, n_layer=2, n_head_kv=2)
    task = {
        "do": "train",
        "model": "",
        "hparams": hparams,
        "dtype": "float64",
        "n_steps": 10,
        "batch_size": 8,
        "n_ctx": 16,
    }
    for mesh, one in on_devices(task | {"meshes": ["fsdp=4", "data=2,fsdp=2,model=2"]})[0].items():
        assert one["loss"] <= 1e-9, mesh
        assert one["params"] <= 1e-9, mesh


@pytest.mark.trial
def test_every_model_answers_alike_on_every_mesh():
    wide = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 2}  # 1558M with 2 of 48 blocks
    llamas = {name: str(ROOT / "tests" / "golden" / "llama_random" / name) for name in LLAMAS}
    tasks = [
        {"do": "infer", "models": {"golden": str(GOLDEN)}, "meshes": ["model=2", "data=2,model=2"]},
        {"do": "infer", "models": llamas, "meshes": ["model=2"]},
        {"do": "infer", "models": {"1558M-shaped": wide}, "meshes": ["model=5"]},
    ]
    for results in on_devices(*tasks, n_devices=20):
        for name, found in results.items():
            print(name, found)
            assert found["logits"] <= 2e-5, name
            assert found["same ids"], name
            n_layer = 2 if "1558M" in name else 3
            assert found["collectives"] == {"all-reduce": 2 * n_layer + 1, "all-gather": 1}, name
