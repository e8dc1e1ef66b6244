"""Settings: names, devices, folders, the network, cost, and the line that a lesson begins with."""

import base64
import random
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dm_course import settings
from dm_course.settings import Course, choose, measure, online, start, tried, verdict

REPO = Path(__file__).parents[1]
VARIABLES = ("SCALE", "DEVICE", "DATA", "CACHE", "OFFLINE")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(f"DM_COURSE_{name}", raising=False)
    for name in ("HF_HUB_OFFLINE", "LOCAL_RANK", "RANK", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(settings, "_answers", {})


# names


def test_choose_gives_the_name_as_it_is_spelled():
    assert choose("MINI", ("mini", "full")) == "mini"
    assert choose(" full ", iter(["mini", "full"])) == "full"
    assert choose("a", ["A", "a"]) == "a"


def test_unknown_name_lists_all_and_the_nearest():
    with pytest.raises(ValueError) as error:
        choose("buterfly", ["butterflies", "flowers", "digits"], "dataset")
    text = str(error.value)
    assert "Unknown dataset 'buterfly'" in text and "Nearest: 'butterflies'" in text
    assert "butterflies, flowers, digits" in text
    with pytest.raises(ValueError, match="none"):
        choose("x", [], "model")
    with pytest.raises(ValueError, match="Valid: mini"):
        choose(None, ["mini"], "scale")


@pytest.mark.parametrize("wrong", ["fulll", "medium", "zzz"])
def test_unknown_scale(wrong, monkeypatch):
    for call in (lambda: start(wrong), lambda: (monkeypatch.setenv("DM_COURSE_SCALE", wrong), start())):
        with pytest.raises(ValueError, match=r"Unknown scale .*Nearest: '(mini|full)'.*Valid: mini, full"):
            call()


# the start of a lesson


def test_start_prints_one_line_and_seeds_everything(capsys):
    course = start(seed=3)
    first = random.random(), np.random.rand(), torch.rand(1).item()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mini scale on ") and "seed 3" in lines[0]
    start(seed=np.int64(3))
    assert first == (random.random(), np.random.rand(), torch.rand(1).item())
    start(seed=4)
    assert first[0] != random.random() and first[2] != torch.rand(1).item()
    assert course.scale == "mini" and course.seed == 3 and course.dtype in (torch.bfloat16, torch.float32)


def test_start_reads_the_environment_and_the_argument_wins(monkeypatch, capsys):
    monkeypatch.setenv("DM_COURSE_SCALE", "full")
    monkeypatch.setenv("DM_COURSE_OFFLINE", "1")
    assert start().scale == "full" and "offline" in capsys.readouterr().out
    assert start("mini").scale == "mini"
    monkeypatch.setenv("DM_COURSE_SCALE", "")
    assert start().scale == "mini"


def test_start_speaks_once_under_many_processes(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    start()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seed", [-1, 1.5, "0", None, 2**32])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed must be a whole number"):
        start(seed=seed)


def test_mini_asks_nothing_of_the_network(monkeypatch, capsys):
    monkeypatch.setattr(settings, "knock", lambda *a: pytest.fail("the network was asked"))
    start("mini")
    assert "Hub" not in capsys.readouterr().out


def test_at():
    mini, full = (Course(s, torch.device("cpu"), 0, torch.float32) for s in ("mini", "full"))
    assert mini.at(mini=(32, 8), full=(256, 4)) == (32, 8) and full.at(mini=None, full=1) == 1
    for wrong in ({"mini": 1}, {"mini": 1, "ful": 2}, {"mini": 1, "full": 2, "huge": 3}):
        with pytest.raises(ValueError, match="mini, full"):
            mini.at(**wrong)


def test_generators_are_fresh_and_noise_is_the_cpus():
    course = Course("mini", torch.device("cpu"), 5, torch.float32)
    assert torch.equal(course.randn(2, 3), torch.randn(2, 3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(course.randn(4, offset=2), torch.randn(4, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(torch.rand(3, generator=course.generator()), torch.rand(3, generator=course.generator()))
    with pytest.raises(AttributeError):
        course.seed = 1


# devices


def test_device_can_be_overruled(monkeypatch):
    monkeypatch.setenv("DM_COURSE_DEVICE", "CPU")
    assert settings.pick_device() == torch.device("cpu")
    monkeypatch.setenv("DM_COURSE_DEVICE", "gpu")
    with pytest.raises(ValueError, match="Unknown device .* Valid: cuda, mps, cpu"):
        settings.pick_device()


def test_device_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("DM_COURSE_DEVICE", "cuda")
    with pytest.raises(ValueError, match="machine lacks.*cpu"):
        settings.pick_device()


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert settings.pick_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert settings.pick_device() == torch.device("cuda", 1)
    monkeypatch.setenv("DM_COURSE_DEVICE", "cuda:0")
    assert settings.pick_device() == torch.device("cuda", 0)
    for wrong in ("cuda:2", "cuda:x"):
        monkeypatch.setenv("DM_COURSE_DEVICE", wrong)
        with pytest.raises(ValueError, match="GPU number"):
            settings.pick_device()


def test_dtype_follows_the_chip(monkeypatch):
    for capability, dtype in (((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert settings.pick_dtype("cuda:0") == dtype
    if hasattr(torch.cpu, "get_capabilities"):
        for facts, dtype in (({"avx2": True, "avx512_bf16": False}, torch.float32), ({"bf16": True}, torch.bfloat16)):
            monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=facts: f)
            assert settings.pick_dtype("cpu") == dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(capsys):
    course = start()
    assert course.device.type == "cuda" and "GPU" in capsys.readouterr().out
    with measure() as cost:
        torch.ones(25_000_000, device=course.device)
    assert 100 <= cost.peak_mb < 10_000
    assert course.randn(3).device == course.device


# folders


def test_data_dir(tmp_path, monkeypatch):
    assert settings.data_dir() is None
    (tmp_path / "data").mkdir()
    deep = tmp_path / "repo" / "nbs" / "unit1"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    for named in (str(tmp_path / "data"), "../data", "../../../data"):  # from the repository's top, or from here
        monkeypatch.setenv("DM_COURSE_DATA", named)
        assert settings.data_dir() == (tmp_path / "data").resolve()
    monkeypatch.setenv("DM_COURSE_DATA", "no/such/folder")
    with pytest.raises(ValueError, match="DM_COURSE_DATA names 'no/such/folder'"):
        settings.data_dir()


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("DM_COURSE_CACHE", str(tmp_path / "a" / "b"))
    assert settings.cache_dir() == tmp_path / "a" / "b" and settings.cache_dir().is_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DM_COURSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="DM_COURSE_CACHE"):
        settings.cache_dir()
    monkeypatch.delenv("DM_COURSE_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # can't be written to: a temporary folder instead
    assert settings.cache_dir().is_dir() and tmp_path not in settings.cache_dir().parents


# the network


@pytest.fixture
def server():
    """A host on this machine that answers each call with the text in `reply`, and counts the calls."""

    class Host:
        calls, reply = [], b""

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        Host.port = listener.getsockname()[1]

        def serve():
            while True:
                try:
                    call, _ = listener.accept()
                except OSError:
                    return
                with call:
                    Host.calls.append(call.recv(4000) if Host.reply else b"")
                    call.sendall(Host.reply)

        threading.Thread(target=serve, daemon=True).start()
        yield Host


def wait_for(calls, n):
    end = time.monotonic() + 3
    while len(calls) < n and time.monotonic() < end:
        time.sleep(0.01)
    return len(calls)


def test_online_knocks_once(server):
    url = f"http://127.0.0.1:{server.port}"
    assert online(url=url) and online(url=url)
    assert wait_for(server.calls, 1) == 1
    time.sleep(0.05)
    assert len(server.calls) == 1


def test_online_asks_the_hub_wherever_it_is(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.port}")
    assert online()
    assert wait_for(server.calls, 1) == 1


def test_a_refused_connection_is_offline_and_remembered_for_a_minute(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert not online(url=url)
    monkeypatch.setattr(settings, "knock", lambda *a: None)
    assert not online(url=url)
    settings._answers[url] = (False, time.monotonic() - 61)
    assert online(url=url)


@pytest.mark.parametrize("variable", ["DM_COURSE_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_by_order(variable, monkeypatch):
    monkeypatch.setattr(settings, "knock", lambda *a: pytest.fail("the network was asked"))
    monkeypatch.setenv(variable, "1")
    assert settings.offline() and not online()
    for off in ("0", "", "false"):
        monkeypatch.setenv(variable, off)
        assert not settings.offline()


def test_a_name_that_is_never_resolved_ends_within_three_seconds(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(20))
    began = time.monotonic()
    assert not online(url="https://nobody.invalid")
    assert 2.5 < time.monotonic() - began < 4.5


def test_a_host_that_never_answers_ends_in_time():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        callers = [socket.socket() for _ in range(8)]  # the queue is full
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(silent.getsockname())
        began = time.monotonic()
        assert not online(timeout=0.4, url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert time.monotonic() - began < 2
        for caller in callers:
            caller.close()


def test_a_proxy_is_asked_to_tunnel(server, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://me:s%40fe@127.0.0.1:{server.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.reply = b"HTTP/1.1 200 Connection established\r\n\r\n"
    server.calls.clear()
    assert online(url="https://hub.invalid")
    assert server.calls[0].startswith(b"CONNECT hub.invalid:443 ")
    assert base64.b64encode(b"me:s@fe") in server.calls[0]
    server.reply = b"HTTP/1.1 403 Forbidden\r\n\r\n"
    assert not online(url="https://elsewhere.invalid")


def test_in_time_leaves_slow_and_failing_work_alone():
    began = time.monotonic()
    assert settings.in_time(lambda: None, 1)
    assert not settings.in_time(lambda: time.sleep(9), 0.1) and not settings.in_time(lambda: 1 / 0, 1)
    assert time.monotonic() - began < 4


# cost


def test_measure_sees_time_and_memory(monkeypatch):
    monkeypatch.setenv("DM_COURSE_DEVICE", "cpu")
    with measure() as before:
        pass
    with measure() as cost:
        big = np.ones(15_000_000)  # 120 MB
        time.sleep(0.15)
        assert 0 < cost.seconds
        del big
    assert 0.15 <= cost.seconds < 15 and cost.peak_mb > before.peak_mb + 80
    seconds = cost.seconds
    time.sleep(0.02)
    assert cost.seconds == seconds and "MB" in repr(cost)


def test_the_peak_of_a_gpu_outlives_the_blocks_that_are_measured(monkeypatch):
    held = {"peak": 0}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(peak=0))
    gpu = torch.device("cuda", 7)
    held["peak"] = 9e9
    with measure(gpu) as cost:
        held["peak"] = 2e9
    assert cost.peak_mb == 2000 and settings.peak_memory(gpu) == 9000
    with measure(gpu):
        held["peak"] = 11e9
    with measure(gpu):
        pass
    assert settings.peak_memory(gpu) == 11000


def test_measure_ends_when_the_block_fails(monkeypatch):
    monkeypatch.setenv("DM_COURSE_DEVICE", "cpu")
    threads = threading.active_count()
    with pytest.raises(KeyError):
        with measure() as cost:
            raise KeyError
    assert cost.stopped is not None and threading.active_count() == threads
    settings.sync("cpu")


def test_usable_cores_keep_to_the_containers_quota(monkeypatch):
    full = settings.usable_cores()
    assert full >= 1
    for text, cores in (("max 100000", full), ("100000 100000", 1), ("50000 100000", 1), ("nonsense", full)):
        monkeypatch.setattr(Path, "read_text", lambda self, t=text: t)
        assert settings.usable_cores() == cores


# the whole, in a clean process


def test_import_is_quiet_and_start_is_quick():
    code = """
import warnings, torch, numpy, matplotlib.pyplot
warnings.simplefilter("error")
import socket
def no(*a, **k): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = no
import dm_course.settings, dm_course.plotting, dm_course.zoo
import sys, time
began = time.process_time()
dm_course.settings.start()
assert time.process_time() - began < 1, time.process_time() - began
assert not {"diffusers", "transformers", "nbdev", "fastcore"} & set(sys.modules), "heavy import"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1


def test_nothing_here_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start()
        settings.usable_cores(), settings.pick_dtype(), settings.cache_dir()


def test_a_learners_function_never_ends_in_a_traceback(capsys):
    assert tried(lambda x: x + 1, 1) == (2, None)
    answer, problem = tried(lambda x: x + 1, "a")
    assert answer is None and "TypeError" in problem
    assert tried(lambda: None)[1] == "your function gives None"
    assert tried(torch.zeros, 2, shape=(3,))[1] == "what comes out should be shaped (3,), not (2,)"
    assert verdict(None) and not verdict("no")
    assert capsys.readouterr().out == "Right.\nNot yet: no\n"
