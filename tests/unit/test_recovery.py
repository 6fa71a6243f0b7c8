"""Snapshots, and the decision to roll back, without processes."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

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


def recovery_of(lr=0.1):
    model = nn.Linear(2, 1)
    recovery = Recovery((model,), torch.optim.SGD(model.parameters(), lr=lr), None)
    nn.init.constant_(model.weight, 1.0)
    recovery.keep()
    return model, recovery


def end_round(model, recovery, loss, weight=None):
    """Whether the round is undone. By default the weights move by a tenth, which is neither far nor nothing."""
    nn.init.constant_(model.weight, 1.1 * recovery._snapshot._copies[0][0, 0].item() if weight is None else weight)
    losses = [loss] if isinstance(loss, float) else loss
    if recovery.is_needed([True], losses, watches_losses=True):
        recovery.restore()
        return True
    recovery.observe(losses)
    recovery.keep()
    return False


def test_a_state_on_its_way_to_blowing_up_is_not_one_to_go_back_to():
    model, recovery = recovery_of()
    for weight, loss in ((1.1, 2.0), (1.2, 1.0), (1.3, 2.1), (1.4, 1.9), (1.5, 2.0), (1.6, 2.7), (1.7, 3.6)):
        assert not end_round(model, recovery, loss, weight)  # they rise by half of their range, and by more
    spread, moved = 3.6 - 1.0, 0.5
    for count, bound in ((1, 10.0), (2, 10.0), (3, 20.0)):  # where the loss stays as high, only twice as much will do
        nn.init.constant_(model.weight, 1.5 * (1 + moved))
        assert not recovery.is_needed([True], [3.6 + spread * (bound - 0.1)], watches_losses=True)
        assert recovery.is_needed([True], [3.6 + spread * (bound + 0.1)], watches_losses=True)
        recovery.restore()
        assert recovery.count == count
        assert model.weight.tolist() == [[pytest.approx(1.5)] * 2]
    nn.init.constant_(model.weight, 1.7)
    assert recovery.is_needed([False], [], watches_losses=False)


@pytest.mark.parametrize(
    ("moved", "bound"), [(0.04, None), (0.06, 5 / 0.06), (0.5, 10.0), (1.25, 4.0), (2.0, 3.0), (50.0, 3.0)]
)
def test_how_far_the_loss_must_jump_depends_on_how_far_the_weights_moved(moved, bound):
    model, recovery = recovery_of()
    for loss in (1.0, 0.5, 0.0, 0.2, 0.3):
        assert not end_round(model, recovery, loss, 1.0)
    nn.init.constant_(model.weight, 1 + moved)
    assert not recovery.is_needed([True], [1 + 0.9 * (bound or 1e9)], watches_losses=True)
    assert recovery.is_needed([True], [1 + 1.1 * (bound or 1e9)], watches_losses=True) == (bound is not None)


def test_in_the_first_rounds_only_a_very_large_jump_tells_anything():
    model, recovery = recovery_of()
    assert not end_round(model, recovery, 1.0, 1.1)
    assert not recovery.is_needed([True], [1e30], watches_losses=True)  # one round has no spread
    assert not end_round(model, recovery, 0.5, 1.2)
    for moved, bound in ((0.1, 100.0), (1.0, 10.0), (5.0, 3.0)):
        nn.init.constant_(model.weight, 1.2 * (1 + moved))
        assert not recovery.is_needed([True], [1 + 0.5 * 0.9 * bound], watches_losses=True)
        assert recovery.is_needed([True], [1 + 0.5 * 1.1 * bound], watches_losses=True)


@pytest.mark.parametrize(("losses", "undone"), [([1.0, 1.1], False), ([1.0] * 4, False), ([1.0, 1.1, 0.9, 1.0], True)])
def test_after_one_round_the_spread_is_that_of_four_replicas_or_more(losses, undone):
    model, recovery = recovery_of()
    assert not end_round(model, recovery, losses, 1.0)
    assert end_round(model, recovery, [loss + 10 for loss in losses], 2.0) is False
    model, recovery = recovery_of()
    assert not end_round(model, recovery, losses, 1.0)
    assert end_round(model, recovery, [loss + 30 for loss in losses], 2.0) is undone


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("constant", [-30.0, 0.0, 1e4])
def test_neither_the_zero_nor_the_unit_of_a_loss_matters(scale, constant):
    """Of a blow-up at the end, and of none before."""
    _, recovery = recovery_of()
    model = recovery._models[0]
    noise = torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).tolist()
    undone = [end_round(model, recovery, [scale * (constant + x) for x in row]) for row in [*noise, [600.0, 700.0]]]
    assert undone == [False] * 40 + [True]


@pytest.mark.parametrize(
    "course",
    [
        lambda k: 0.1 * k,  # a ramp from the beginning
        lambda k: max(0.0, k - 10.0),  # or from 0 on
        lambda k: 1 / (1 + k) + 0.02 * k,  # an annealed term
        lambda k: 2.0**k,
        lambda k: 3 / (1 + k) + 4 * (k > 15) + 9 * (k > 30),  # a curriculum
        lambda k: -200 / (1 + math.exp(5 - k)),
        lambda k: 200 / (1 + math.exp(5 - k)),  # a reward
        lambda k: 0.0,
        lambda k: 7.0,
        lambda k: 3.2 * (k > 4),  # nothing is learned from before the buffer is full
    ],
)
@pytest.mark.parametrize("far", [1.2, 3.0])
def test_a_loss_that_rises_by_design_is_not_rolled_back(course, far):
    model, recovery = recovery_of()
    for k in range(40):
        weight = far * recovery._snapshot._copies[0][0, 0].item()
        assert not end_round(model, recovery, [course(k), course(k)], weight if weight < 1e30 else 1.0), k


def test_a_loss_that_no_learning_rate_lowers_does_not_end_the_run():
    model, recovery = recovery_of()
    for loss in (1.0, 0.5, 0.3, 0.2, 0.1):
        assert not end_round(model, recovery, loss)
    for _ in range(100):  # every other round meets an example that is lost
        end_round(model, recovery, 0.1)
        end_round(model, recovery, 100.0)
    assert recovery.count == 3
    for _ in range(5):
        assert recovery.is_needed([False], [10.0], watches_losses=True)
        recovery.restore()
    with pytest.raises(hdet.DivergedError, match="after 8 rollbacks"):
        recovery.is_needed([False], [10.0], watches_losses=True)


def test_a_state_of_an_earlier_version_is_loaded_with_the_first_loss_alone():
    model, recovery = recovery_of()
    recovery.check_state({"first_loss": 2.0, "rollbacks": 1})
    recovery.load({"first_loss": 2.0, "rollbacks": 1})
    assert (recovery.count, tuple(recovery.level)) == (1, (1, 2.0, 2.0, 0.0))
    recovery.load({"first_loss": math.nan, "rollbacks": 0})
    assert recovery.state()["loss_level"] == []
    assert not end_round(model, recovery, [1.0, 2.0])
    saved = recovery.state()
    other = recovery_of()[1]
    other.check_state(saved)
    other.load(saved)
    assert other.level == recovery.level
    for bad in ([1, 2.0], [1, 2.0, 1.0, 0.0], [1, math.nan, 1.0, 0.0], "abcd"):
        with pytest.raises((TypeError, ValueError), match="loss_level"):
            recovery.check_state(saved | {"loss_level": bad})


def test_the_message_says_why_and_names_the_way_out(caplog):
    model, recovery = recovery_of()
    for loss in (1.0, 0.5, 0.0, 0.2, 0.3, 99.0):
        end_round(model, recovery, loss)
    recovery.warn(30)
    assert "99 is above all earlier rounds' by 98 times" in caplog.text
    assert "rollback=False" in caplog.text


# ------------------------------------------------------------------------------------------------------ the first copy


@pytest.mark.parametrize("how", ["as it is", "evaluated before", "weights loaded after a forward pass"])
def test_the_first_copy_is_taken_before_batch_norm_moves(how):
    model = probed_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recovery = Recovery((model,), optimizer, None)
    if how == "evaluated before":
        with torch.no_grad():
            model(torch.randn(16, 4))
    begun = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(16, 4)).square().mean().backward()
    if how == "weights loaded after a forward pass":
        begun = {name: tensor + 1 for name, tensor in begun.items()}
        model.load_state_dict(begun)
    assert not any(module._forward_pre_hooks for module in model.modules())
    copy.deepcopy(model)
    optimizer.step()
    assert recovery.can_restore
    recovery.restore()
    assert all(torch.equal(tensor, begun[name]) for name, tensor in model.state_dict().items())


def test_a_model_can_be_copied_and_pickled_before_its_first_forward_pass():
    model = probed_model()
    recovery = Recovery((model,), torch.optim.SGD(model.parameters(), lr=0.1), None)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.randn(16, 4))
    assert any(module._forward_pre_hooks for module in model.modules())
    del recovery


def test_what_is_not_finite_at_the_start_is_no_state_to_go_back_to():
    for poison in ("parameter", "buffer", "state"):
        model = probed_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        recovery = Recovery((model,), optimizer, None)
        bad = {"parameter": model[0].bias, "buffer": model[1].running_mean}.get(poison)
        (optimizer.state[model[0].bias]["exp_avg"] if bad is None else bad.data)[0] = math.nan
        optimizer.step()
        assert not recovery.can_restore


# ------------------------------------------------------------------------------------------------------------- toys


def rollbacks_of(model, optimizer, loss_fn, schedule=None, steps=150, **settings):
    """Rounds that are undone in a run of two virtual replicas. ``loss_fn(step, generator)`` may return what is reported
    beside the loss."""
    ensemble = hdet.Ensemble(
        optimizer, schedule, model=model, spread=0.2, converge_every=5, total_steps=steps, auto_lr=True,
        virtual_replicas=2, controller=hdet.controller.Published(), **settings,
    )  # fmt: skip
    generator, undone = torch.Generator().manual_seed(0), []
    for step in range(steps):
        optimizer.zero_grad()
        told = []
        for _ in ensemble.each(range(2)):
            loss = loss_fn(step, generator)
            loss, reported = loss if isinstance(loss, tuple) else (loss, loss)
            (loss / 2).backward()
            told.append(reported.item())
        optimizer.step()
        ensemble.step(told)
        if step % 5 == 4 and ensemble.last_report.rolled_back:
            undone.append(step // 5)
    return undone


def spike(factor, at=75):
    """A schedule that goes wrong for a round."""
    return lambda step: factor if at <= step < at + 5 else 1.0


@pytest.mark.parametrize("reports", ["loss", "reward"])
def test_a_policy_gradient_is_not_rolled_back(reports):
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3))

    def loss_fn(step, generator):
        x = torch.randn(32, 4, generator=generator)
        log_p = policy(x).log_softmax(1)
        action = torch.multinomial(log_p.exp().detach(), 1, generator=generator)[:, 0]
        reward = (x[:, :3].argmax(1) == action).float()
        advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
        loss = -(log_p[torch.arange(32), action] * advantage).mean()
        return (loss, 200 * reward.mean()) if reports == "reward" else loss

    assert rollbacks_of(policy, torch.optim.Adam(policy.parameters(), 1e-2), loss_fn) == []


def test_a_surrogate_whose_value_is_0_is_not_rolled_back_but_a_policy_that_is_not_finite_is():
    policy = nn.Linear(3, 1)

    def loss_fn(step, generator):
        x = torch.randn(64, 3, generator=generator)
        y = policy(x)[:, 0]
        advantage = x.sum(1) + torch.randn(64, generator=generator)
        advantage = (advantage - advantage.mean()) / advantage.std()
        return -((y - y.detach()).exp() * advantage).mean() * (math.inf if bad and step == 77 else 1.0)

    for bad in (False, True):
        nn.init.ones_(policy.weight)
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
        assert rollbacks_of(policy, optimizer, loss_fn) == ([15] if bad else [])


@pytest.mark.parametrize("anneal", ["linear", "late", "step", "cycle"])
@pytest.mark.parametrize("factor", [1.0, 100.0])
def test_a_vae_with_an_annealed_term_is_rolled_back_if_it_blows_up_only(anneal, factor):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8))
    decoder = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 16))
    model, mixing = nn.ModuleList([encoder, decoder]), torch.randn(4, 16)
    beta = {
        "linear": lambda x: min(1.0, 2 * x),
        "late": lambda x: min(1.0, max(0.0, 5 * (x - 0.3))),
        "step": lambda x: float(x > 0.4),
        "cycle": lambda x: min(1.0, 2 * (4 * x % 1)),
    }[anneal]

    def loss_fn(step, generator):
        x = torch.randn(32, 4, generator=generator) @ mixing + 0.1 * torch.randn(32, 16, generator=generator)
        mean, log_variance = encoder(x).chunk(2, 1)
        z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator)
        kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(1).mean()
        return 5 * (decoder(z) - x).square().sum(1).mean() + beta(step / 150) * kl

    undone = rollbacks_of(model, torch.optim.AdamW(model.parameters(), 1e-2), loss_fn, spike(factor))
    assert undone[:1] == ([] if factor == 1 else [15])


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1000.0])
def test_a_contrastive_loss_is_rolled_back_if_it_blows_up_only(grows, factor):
    """The more negatives, the larger the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8))

    def loss_fn(step, generator):
        x = torch.randn(32, 16, generator=generator)
        a, b = (F.normalize(model(x + 0.3 * torch.randn(32, 16, generator=generator)), dim=1) for _ in range(2))
        count = 8 + 24 * step // 150 if grows else 32
        return F.cross_entropy(a[:count] @ b[:count].T / 0.1, torch.arange(count))

    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    undone = rollbacks_of(model, optimizer, loss_fn, spike(factor), steps=100)
    assert undone == [] or factor > 1
    assert undone[:1] == [15] or factor == 1 or grows
