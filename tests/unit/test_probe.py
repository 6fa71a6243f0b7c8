"""The slow average and the paired probe's parts, without processes."""

import copy
import math

import pytest
import torch
from torch import nn

import hdet
from hdet.converge.buckets import fill_buckets
from hdet.converge.pending import Point
from hdet.converge.slow_average import SlowAverage
from hdet.model.weights import Weights
from hdet.observe.probe import REUSED_AFTER, ProbeBatches, evaluate, evaluation


def test_the_slow_average_and_its_trail_are_the_documented_sums():
    means = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    piece = torch.zeros(5)
    (bucket,) = fill_buckets([piece], 2**20, lambda t: t.device)
    for storage in ({}, {"dtype": torch.bfloat16}, {"device": torch.device("cpu")}):
        slow = SlowAverage(0.25, **storage)
        e = f = means[0].double()
        slow.unpack(0, bucket, means[0].clone(), 1)
        for n, mean in enumerate(means[1:], start=2):
            slow.unpack(0, bucket, mean.clone(), 1)
            e = e + 1.25 / (n + 0.25) * (mean - e)
            f = f + 1.25 / (n + 0.25) * (e - f)
            assert torch.equal(piece, mean)
        tolerance = {"atol": 0.05, "rtol": 0.05} if "dtype" in storage else {}
        torch.testing.assert_close(slow.point(0, 1, piece), (2 * e - f).float(), **tolerance)
        torch.testing.assert_close(slow.point(0, -1, piece), f.float(), **tolerance)
        torch.testing.assert_close(slow.point(0, 3.0, piece), (4 * e - 3 * f).float(), **tolerance)
        torch.testing.assert_close(slow.mirrored(0, means[-1]), (2 * e - means[-1]).float(), **tolerance)


def test_a_slow_average_in_bf16_keeps_up_over_thousands_of_rounds():
    """Its steps are then smaller than half a digit."""
    piece, rounds = torch.zeros(500), 2000
    (bucket,) = fill_buckets([piece], 2**20, lambda t: t.device)
    slow = SlowAverage(0.25, dtype=torch.bfloat16)
    for n in range(rounds):
        slow.unpack(0, bucket, torch.full((500,), 1 + n / rounds), 1)
    assert slow.rounds == rounds
    progress = slow.point(0, 1.0, piece) - slow.point(0, 0.0, piece)
    assert progress.mean() == pytest.approx(slow.lag / rounds, rel=0.02)


@pytest.mark.parametrize("power", [0.0, 0.25, 3.0])
def test_the_lag_of_a_slow_average_is_that_of_steady_progress(power):
    piece = torch.zeros(1, dtype=torch.float64)
    (bucket,) = fill_buckets([piece], 2**20, lambda t: t.device)
    slow = SlowAverage(power)
    for n in range(1, 31):
        slow.unpack(0, bucket, torch.full((1,), float(n), dtype=torch.float64), 1)
        progress = slow.point(0, 1, piece) - slow.point(0, 0, piece)
        assert float(progress) == pytest.approx(slow.lag if n > 1 else 0.0)


def probed_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


def test_evaluate_uses_the_five_points_and_leaves_no_trace():
    model = probed_model()
    model[2].eval()  # a part that the user keeps in eval mode
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    (bucket,) = fill_buckets(parameters, 2**20, lambda t: t.device)
    mean = bucket.pack()
    displacement = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    slow = SlowAverage(0.25)
    slow.unpack(0, bucket, mean.clone(), 1)
    slow.unpack(0, bucket, mean * 1.1, 1)
    bucket.write(mean)
    batch = torch.randn(16, 4)
    visited = []

    def loss_fn(module, x):
        visited.append(bucket.pack())
        assert not torch.is_grad_enabled()
        assert not any(part.training for part in module.modules())
        torch.rand(3)
        return module(x).square().mean()

    state = torch.get_rng_state()
    found = evaluate((model,), loss_fn, batch, [Point(bucket, mean, displacement)], slow, Weights((model,)))
    assert len(set(found)) == 5
    e = slow.point(0, 0, mean)
    for at, expected in zip(
        visited,
        (mean + displacement, mean - displacement, slow.point(0, 1, mean), slow.point(0, -1, mean), 2 * e - mean),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(at, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model] == [True, True, False, True]
    assert model.training


def test_a_loss_that_draws_noise_draws_the_same_at_every_point():
    """Points are compared with one another: the noise's own differences would hide the parameters'."""
    model = nn.Linear(4, 4)
    (bucket,) = fill_buckets(list(model.parameters()), 2**20, lambda t: t.device)
    mean = bucket.pack()
    slow = SlowAverage(0.25)
    slow.unpack(0, bucket, mean.clone(), 1)
    drawn = []

    def loss_fn(module, x):
        drawn.append(torch.randn_like(x))  # as in a diffusion model
        if len(drawn) == 2:
            torch.rand(7)
        return (module(x + drawn[-1]) - x).square().mean()

    points = [Point(bucket, mean, torch.zeros_like(mean))]
    for _ in range(2):
        found = evaluate((model,), loss_fn, torch.randn(16, 4), points, slow, Weights((model,)))
        assert len(set(found)) == 1
    assert all(torch.equal(noise, drawn[0]) for noise in drawn[:5])
    assert all(torch.equal(noise, drawn[5]) for noise in drawn[5:])
    assert not torch.equal(drawn[0], drawn[5])


@pytest.mark.parametrize("frozen", [False, True])
def test_the_probe_normalises_by_the_statistics_that_training_uses(frozen):
    """Running statistics are those of recent parameters: at another point they would make the loss worse than it is."""
    model = probed_model()
    if frozen:
        model[1].eval()  # as in fine-tuning with fixed statistics
    before = copy.deepcopy(model.state_dict())
    batch = torch.randn(16, 4) * 3 + 1

    def output():
        with torch.no_grad():
            return model[3](model[1](model[0](batch)))

    expected = output()  # without dropout; outside of the probe it moves the running statistics
    model.load_state_dict(before)

    def evaluated():
        with evaluation((model,)):
            assert not model[1].training
            assert torch.equal(model(batch), expected)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        evaluated()
    assert [part.training for part in model] == [True, not frozen, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


def test_instance_normalisation_that_tracks_statistics_does_not_use_them_in_the_probe():
    norm = nn.InstanceNorm2d(3, track_running_stats=True)
    batch = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    with evaluation((norm,)):
        found = norm(batch)
    assert norm.track_running_stats
    assert norm.training
    assert norm.num_batches_tracked == 0
    assert torch.equal(found, norm(batch))


@pytest.mark.parametrize("bad", [torch.ones(2), torch.tensor(1), "1.0", None])
def test_a_loss_function_must_return_a_scalar(bad):
    model = probed_model()
    (bucket,) = fill_buckets(list(model.parameters()), 2**20, lambda t: t.device)
    mean = bucket.pack()
    slow = SlowAverage(0.25)
    slow.unpack(0, bucket, mean, 1)
    with pytest.raises(TypeError, match="Must be a scalar loss"):
        evaluate((model,), lambda *_: bad, None, [Point(bucket, mean, torch.ones_like(mean))], slow, Weights((model,)))
    assert torch.equal(bucket.pack(), mean)
    assert model.training


def test_batches_are_used_again_when_they_are_forgotten():
    batches = ProbeBatches(hdet.Probe(loss_fn=print), round_length=10)
    memory = torch.zeros(2)
    for i in range(8):
        assert batches.ready == (i > math.ceil(REUSED_AFTER / 10))
        if batches.ready:
            assert batches.next()["x"].tolist() == [i - 5.0] * 2
        batches.keep({"x": memory.fill_(i)})  # as a loader does that uses its memory again
    own = ProbeBatches(hdet.Probe(loss_fn=print, batches=[1, 2]), round_length=10)
    assert own.ready
    assert [own.next() for _ in range(5)] == [1, 2, 1, 2, 1]
