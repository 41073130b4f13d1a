"""A CPU that answers to ``cuda``: what scripts call, each test in a process of its own."""

import io
from unittest import mock

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import nn

from moco_fast.compat import device


def devices(folder):
    for made in (torch.device("cuda", 1), torch.device(type="cuda", index=1), torch.device("cuda:1")):
        assert made == torch.device("cpu") and nn.Linear(2, 2).to(made).weight.device == made
    assert torch.device("meta").type == "meta"


def groups(folder):
    dist.destroy_process_group()
    start = {"init_method": f"file://{folder}/again", "rank": 0, "world_size": 1}
    dist.init_process_group("nccl", **start, device_id=torch.device("cuda", 0))
    group = dist.new_group([0], backend="nccl")
    assert dist.get_backend() == dist.get_backend(group) == "gloo"
    dist.all_reduce(torch.ones(1, device="cuda"), group=group)
    dist.barrier(device_ids=[0])


def autocast(folder):
    x = torch.ones(2, 2, device="cuda")
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cuda", dtype=dtype):
            assert (x @ x).dtype == torch.float32


def questions(folder):
    for each in (0, "cuda:1", torch.device("cuda", 1)):
        with torch.cuda.device(each):
            assert torch.ones(1, device="cuda").device.type == "cpu"
    assert torch.cuda.get_device_name(0) == "CPU" and torch.cuda.device_count() == 2


def random_states(folder):
    state, states = torch.cuda.get_rng_state(), torch.cuda.get_rng_state_all()
    assert len(states) == 2
    want = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state, "cuda:0")
    assert torch.equal(torch.rand(3, device="cuda"), want)
    torch.cuda.set_rng_state_all(states)
    torch.cuda.set_rng_state(torch.zeros(16, dtype=torch.uint8))  # as long as a GPU's
    assert torch.equal(torch.rand(3, device="cuda"), want)
    torch.cuda.set_rng_state(state)
    for options in ({}, {"devices": [0, 1]}):
        with torch.random.fork_rng(**options):
            torch.rand(7, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), want)


def files(folder):
    file = io.BytesIO()
    want = torch.arange(3.0)
    with mock.patch("torch.serialization.location_tag", return_value="cuda:1"):
        torch.save({"x": want}, file)
    places = [None, "cpu", "cuda:0", torch.device("cuda", 0), {"cuda:0": "cuda:0"}, {"cuda:1": "cuda:0"}]
    places += [lambda storage, location: storage, lambda storage, location: storage.cuda(0)]
    for place in places:
        file.seek(0)
        x = torch.load(file, map_location=place)["x"]
        assert x.device.type == "cpu" and torch.equal(x, want)
    file.seek(0)
    assert torch.load(file, "meta")["x"].is_meta


def loaders(folder):
    data = torch.utils.data.TensorDataset(torch.arange(5))
    for loader in (
        torch.utils.data.DataLoader(data, 2, True, None, None, 0, None, True, True),
        torch.utils.data.DataLoader(data, 2, pin_memory=True, drop_last=True),
    ):
        assert not loader.pin_memory and [len(x) for (x,) in loader] == [2, 2]


def rank_calls(rank, calls, folder):
    device.use_cpu(2)
    calls(folder)


@pytest.mark.parametrize("calls", [devices, groups, autocast, questions, random_states, files, loaders])
def test_calls_of_scripts(tmp_path, calls):
    ranks.run(1, rank_calls, calls, str(tmp_path), folder=tmp_path)
