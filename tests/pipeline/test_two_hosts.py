"""A pipeline over two hosts: two network namespaces, joined by a link of 1 Gbit/s. Needs root, `ip` and `tc`."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from two_hosts_program import Block, data, mean_square

PROGRAM = Path(__file__).parent / "two_hosts_program.py"
NAMES, ADDRESSES = ("tpmp-host0", "tpmp-host1"), ("10.99.7.1", "10.99.7.2")
MICROBATCHES, WIDTH = 12, 4096
BANDWIDTH = 1e9 / 8  # bytes a second


def command(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, check=check)


@contextmanager
def two_hosts():
    """Both namespaces, or a skip with the reason."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("network namespaces need root, ip and tc")
    try:
        for name in NAMES:
            command("ip", "netns", "add", name)
        command("ip", "link", "add", "veth0", "netns", NAMES[0], "type", "veth", "peer", "veth1", "netns", NAMES[1])
        for number, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True)):
            device = f"veth{number}"
            command("ip", "-n", name, "addr", "add", f"{address}/24", "dev", device)
            for each in (device, "lo"):
                command("ip", "-n", name, "link", "set", each, "up")
            limit = ("rate", "1gbit", "burst", "256kb", "latency", "50ms")
            command("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", device, "root", "tbf", *limit)
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {' '.join(error.cmd)}: {error.stderr.strip()}")
    finally:
        for name in NAMES:
            command("ip", "netns", "del", name, check=False)


def start(host: int, *arguments: object, **environment: object) -> subprocess.Popen:
    environment = {"GLOO_SOCKET_IFNAME": f"veth{host}", "OMP_NUM_THREADS": 1, **environment}
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[host], sys.executable, *map(str, arguments)],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outputs(ranks: list[subprocess.Popen]) -> list[str]:
    """What each has printed, once all have ended well."""
    try:
        said = [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), said
    return [out for out, _ in said]


def one_process() -> tuple[list[float], list[float]]:
    blocks, losses = [Block(0, WIDTH), Block(1, WIDTH)], []
    for _ in range(2):
        for x, target in zip(*data(MICROBATCHES, WIDTH), strict=True):
            loss = mean_square(blocks[1](blocks[0](x)), target)
            loss.backward()
            losses.append(loss.item())
    return losses[:MICROBATCHES], [block.weight.grad.double().sum().item() for block in blocks]


@pytest.mark.full
def test_over_a_link_of_1_gbit_the_pipeline_is_right_and_hides_its_transfers(monkeypatch):
    """Both to the bit; of the time that all messages take one after the other, at most a fifth is waited for."""
    with two_hosts():
        said = outputs([start(rank, PROGRAM, rank, ADDRESSES[0], MICROBATCHES, WIDTH) for rank in range(2)])
    found = json.loads(said[0].splitlines()[-1])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: sums of more threads have other bits
    losses, gradients = one_process()
    torch.set_num_threads(threads)
    assert found["losses"] == losses and found["gradients"] == gradients
    serial = 2 * MICROBATCHES * found["bytes"] / BANDWIDTH
    assert serial > 0.4
    assert sum(found["exposed"]) / 2 <= 0.2 * serial, f"{found['exposed']} of {serial:.2f} s"


CONFIG = """
model = {{ vocab_size = 256, hidden = 32, layers = 2, heads = 4, kv_heads = 2, ffn = 48 }}
data = {{ source = "{folder}/text", cache = "{folder}/cache", sequence = 16 }}
parallel = {{ tp = 2, pp = 2, schedule = "1f1b-eager", microbatches = 4 }}
training = {{ steps = 3, batch = 8 }}
proof = {{ fp64_steps = 3, fp32_steps = 3 }}
output = {{ run_dir = "{folder}/run" }}
"""


@pytest.mark.full
def test_hosts_of_two_ranks_share_memory_within_and_send_between(tmp_path):
    """`tpmp train` with ranks as torchrun starts them: tensor parallel on each host, the pipeline over both, proved."""
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog; " * 400)
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    world = {"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29432}
    with two_hosts():
        ranks = [
            start(
                rank // 2, "-m", "tpmp_kernels", "train", config,
                RANK=rank, LOCAL_RANK=rank % 2, TORCHELASTIC_RUN_ID="two hosts", **world,
            )
            for rank in range(4)
        ]  # fmt: skip
        said = outputs(ranks)
    assert "transport shm in tp, process_group in pp" in said[0]
    assert said[0].count(": equal") == 2
