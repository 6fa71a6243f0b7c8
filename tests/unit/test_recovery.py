"""Snapshots, and the decision to roll back, without processes."""

import pytest
import torch
from torch import nn

import hdet
from hdet.model.snapshot import Snapshot
from hdet.steer.recovery import Recovery


def probed_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))


# --------------------------------------------------------------------------------------------------------- snapshots


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_a_snapshot_brings_everything_back_in_place(kind, device):
    model = probed_model()
    optimizer = kind(model.parameters(), lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

    def step():
        optimizer.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()

    fresh = Snapshot([model], optimizer, device)
    fresh.take()
    snapshot = Snapshot([model], optimizer, device)
    for _ in range(2):  # the second take() reuses the first one's memory
        step()
        snapshot.take()
    pointers = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    step()
    after = [p.detach().clone() for p in model.parameters()]
    snapshot.restore()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert pointers == [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    torch.set_rng_state(state)
    step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), after, strict=True))
    fresh.restore()
    assert all(not s or kind is torch.optim.Adagrad for s in optimizer.state.values())


# ---------------------------------------------------------------------------------------------------------- recovery


def test_a_state_on_its_way_to_blowing_up_is_not_one_to_go_back_to():
    model = nn.Linear(2, 1)
    recovery = Recovery((model,), torch.optim.SGD(model.parameters(), lr=0.1), None)
    for weight, loss in ((1.0, 2.0), (2.0, 1.0), (3.0, 2.1), (4.0, 2.5), (5.0, 3.9)):
        nn.init.constant_(model.weight, weight)
        assert not recovery.is_needed([True], [loss], watches_losses=True)
        recovery.observe([loss])
        recovery.keep(loss)
    for count, bound in ((1, 4.0), (2, 8.0)):
        assert not recovery.is_needed([True], [bound - 0.1], watches_losses=True)
        assert recovery.is_needed([True], [bound + 0.1], watches_losses=True)
        recovery.restore()
        assert recovery.count == count
        assert model.weight.tolist() == [[3.0, 3.0]]
        nn.init.constant_(model.weight, 6.0)
    assert recovery.is_needed([False], [], watches_losses=False)
    recovery.keep()  # nothing is known of its loss
    recovery.restore()
    assert model.weight.tolist() == [[6.0, 6.0]]


def test_a_loss_that_no_learning_rate_lowers_does_not_end_the_run():
    model = nn.Linear(2, 1)
    recovery = Recovery((model,), torch.optim.SGD(model.parameters(), lr=0.1), None)
    recovery.observe([1.0])
    for _ in range(100):  # every other round meets an example that is lost
        recovery.keep(0.1)
        if recovery.is_needed([True], [10.0], watches_losses=True):
            recovery.restore()
    assert recovery.count == 3
    for _ in range(5):
        assert recovery.is_needed([False], [10.0], watches_losses=True)
        recovery.restore()
    with pytest.raises(hdet.DivergedError, match="after 8 rollbacks"):
        recovery.is_needed([False], [10.0], watches_losses=True)
