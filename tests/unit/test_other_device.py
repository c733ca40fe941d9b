"""The simulated second device refuses what CUDA refuses, and lets through what CUDA lets through."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from other_device import OTHER, OtherTensor, other_device


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    simulated = request.param == "simulated"
    with other_device() if simulated else contextlib.nullcontext():
        yield OTHER if simulated else torch.device(request.param)


def two(device, *shape):
    return torch.arange(2.0, device=device).expand(*shape, 2).contiguous()


REFUSED = {
    "sum of both devices": lambda device: two(device) + two("cpu"),
    "in place into RAM": lambda device: two("cpu").add_(two(device)),
    "in place into a number in RAM": lambda device: torch.tensor(1.0).add_(torch.ones((), device=device)),
    "concatenation": lambda device: torch.cat([two(device), two("cpu")]),
    "stack of numbers": lambda device: torch.stack([torch.ones((), device=device), torch.ones(())]),
    "product": lambda device: two(device, 2) @ two("cpu", 2),
    "layer": lambda device: F.linear(two(device), two("cpu", 2)),
    "convolution": lambda device: F.conv2d(two(device, 1, 1, 2), two("cpu", 1, 1, 2)),
    "choice": lambda device: torch.where(two("cpu") > 0, two(device), two(device)),
    "mask": lambda device: two(device).masked_fill(two("cpu") > 0, 0.0),
    "mix": lambda device: torch.lerp(two(device), two("cpu"), 0.5),
    "index in RAM": lambda device: two(device).index_select(0, torch.tensor([1])),
    "gather in RAM": lambda device: two(device).gather(0, torch.tensor([1])),
    "embedding": lambda device: F.embedding(torch.tensor([1]), two(device, 2)),
    "index of a tensor in RAM": lambda device: two("cpu")[torch.tensor([1], device=device)],
    "values in RAM": lambda device: two(device).index_put((torch.tensor([0, 1], device=device),), two("cpu")),
    "comparison as a whole": lambda device: torch.equal(two(device), two("cpu")),
    "numpy": lambda device: two(device).numpy(),
    "generator": lambda device: torch.randn(2, device=device, generator=torch.Generator()),
    "generator in place": lambda device: two(device).normal_(generator=torch.Generator()),
}


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "ordinary"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses(device, name, inference):
    with torch.inference_mode(inference), pytest.raises((RuntimeError, TypeError)):
        REFUSED[name](device)


def change(x, place, value):
    x[place] = value
    return x


ALLOWED = {
    "number in RAM": lambda device: two(device) * torch.tensor(2.0),
    "number in RAM as the first": lambda device: torch.tensor(2.0) * two(device),
    "choice of a number in RAM": lambda device: torch.where(two(device) > 0, torch.tensor(2.0), two(device)),
    "indices in RAM": lambda device: two(device)[torch.tensor([1, 0])],
    "list of indices": lambda device: two(device, 3)[..., [1, 0]],
    "mask in RAM": lambda device: two(device)[two("cpu") > 0],
    "number put in": lambda device: change(two(device), 0, torch.tensor(7.0)),
    "tensor put in": lambda device: change(two(device, 2), slice(1), two("cpu")),
    "copy in": lambda device: two(device).copy_(torch.ones(2)),
    "literal": lambda device: torch.tensor([1.0, 2.0], device=device),
    "literal beside a tensor": lambda device: two(device).new_tensor([1.0, 2.0]),
    "factories": lambda device: torch.zeros(2, device=device) + two(device).new_full((2,), 3.0),
    "to the place of another": lambda device: two("cpu").to(two(device)),
    "view in place": lambda device: change(two(device, 2).T, 0, 5.0),
    "sum in place": lambda device: two(device, 2).add_(1).mul_(two(device)),
    "result given": lambda device: torch.cat((two(device), two(device)), out=torch.empty(4, device=device)),
}


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "ordinary"])
@pytest.mark.parametrize("name", ALLOWED)
def test_what_cuda_lets_through_gives_the_numbers_of_a_cpu(device, name, inference):
    with torch.inference_mode(inference):
        result = ALLOWED[name](device)
        assert result.device.type == device.type
        assert result.tolist() == ALLOWED[name]("cpu").tolist()


def test_the_way_back(device):
    x = two(device)
    back = torch.zeros(2).copy_(x)
    for value in (x.cpu(), x.to("cpu"), torch.zeros_like(x, device="cpu") + x.cpu(), back):
        assert type(value) is torch.Tensor
        assert value.device.type == "cpu"
    assert back.tolist() == x.tolist() == [0.0, 1.0]
    assert x[1].item() == float(x.sum()) == 1.0
    assert x.any()


def test_gradients_are_those_of_a_cpu(device):
    def gradient(place):
        x = two(place, 2).requires_grad_(True)
        y = F.gelu(x @ two(place, 2).T) + x[:, :1]
        return torch.autograd.grad(y.square().sum(), x)[0]

    assert gradient(device).device.type == device.type
    torch.testing.assert_close(gradient(device).cpu(), gradient("cpu"))


def test_a_module_moves_there_and_back(device):
    layer = torch.nn.Linear(2, 3)
    expected = layer(two("cpu"))
    there = layer.to(device)(two(device))
    torch.testing.assert_close(there.cpu(), expected)
    torch.testing.assert_close(layer.to("cpu")(two("cpu")), expected)


def test_waits_are_counted():
    with other_device() as device:
        x = torch.ones(2).to(OTHER)
        assert device.waits == {"upload": 1}
        device.waits.clear()
        y = (x * 2 + torch.zeros(2).to(OTHER, non_blocking=True)).sum()
        assert not device.waits
        assert float(y) == 4
        assert x[x > 0].cpu().shape == (2,)
        assert device.waits == {"_local_scalar_dense": 1, "index": 1, "download": 1}


def test_numbers_of_the_devices_own_generator_are_refused():
    with other_device(), pytest.raises(RuntimeError, match="would depend on the device"):
        torch.randn(2, device=OTHER)


def test_the_meta_device_is_left_alone():
    with other_device():
        empty = torch.empty(2, device="meta")
    assert empty.is_meta
    assert not isinstance(empty, OtherTensor)
