"""The story of a run in words: made-up rounds in which one thing happens, and a real run."""

import itertools
import math

import pytest
import torch

import hdet
from hdet.monitor import story
from hdet.monitor.report import HyperparameterReport, Report
from hdet.observe.slopes import UNKNOWN_SLOPES
from hdet.steer.report import UNKNOWN_JUDGEMENT, Judgement

NAN = math.nan


def rounds(gains, *, ratios=None, argued=NAN, trust=0.0, rests_from=None, **fixed):
    """Reports of rounds of ten steps, the first of which began at gain 1."""
    found = []
    for k, (before, after) in enumerate(itertools.pairwise([1.0, *gains])):
        ratio = NAN if ratios is None else ratios[k] if isinstance(ratios, (list, tuple)) else ratios
        judgement = Judgement(
            target=0.1,
            centre=after,
            evidence=argued * before,
            estimate=after * 1.1,
            trust=trust[k] if isinstance(trust, list) else trust,
            rests=rests_from is not None and k >= rests_from,
        )
        fields = {
            "step": 10 * (k + 1), "round": k, "complete": True, "replicas": 2, "groups": ("all",),
            "schedule_lr": (0.01,), "gain": (before,), "base_lr": (0.01 * before,),
            "replica_lr": ((0.009 * before, 0.011 * before),), "losses": (2.0, 2.0), "mean_loss": 2.0 / (k + 1),
            "hypergradient": (NAN,), "probe": UNKNOWN_SLOPES, "movement": (0.1 * ratio,), "velocity": (NAN,),
            "next_gain": (after,), "distance": (1.0, 1.0), "excluded": (), "rolled_back": False, "converge_ms": 1.0,
            "converge_bytes": 8, "writer": True, "peak_lr": 0.01,
            "judgements": (UNKNOWN_JUDGEMENT if ratios is None else judgement,),
        }  # fmt: skip
        found.append(Report(**{**fields, **fixed}))
    return found


def changed(report, **fields):
    return Report(**{**vars(report), **fields})


RISE = [1.0 * 1.3**k for k in range(1, 11)]
FALL = [1.0 / 1.3**k for k in range(1, 11)]


def test_nothing_has_happened_yet():
    assert story.sentences([]) == ["No round is over yet."]
    assert story.in_one_sentence([]) == "No round is over yet."
    assert story.now(None) == "no round is over yet"
    assert story.moves([]) == story.groups_of([]) == []


def test_it_begins_with_the_start():
    first = story.sentences(rounds([1.0]))[0]
    assert first == (
        "The peak learning rate was 0.01 (gain 1) at the start, with 2 replicas, under 0.9 to 1.1 times the common "
        "learning rate."
    )
    (alone, *_) = story.sentences(rounds([1.0], replicas=1, losses=(1.0,), replica_lr=((0.01,),), peak_lr=NAN))
    assert alone == "The gain was 1 at the start, with 1 replica."
    (told, *_) = story.sentences(rounds([1.0], peak_lr=NAN), peak_lr=0.5)
    assert told.startswith("The peak learning rate was 0.5 (gain 1)")


def test_raised_because_the_weights_moved_too_little():
    reports = rounds([*RISE, *[RISE[-1]] * 5], ratios=[0.1 * k for k in range(1, 11)] + [1.0] * 5)
    (move,) = story.moves(reports)
    assert (move.kind, move.first, move.last) == ("raised", 10, 100)
    assert move.gain == RISE[-1]
    assert story.sentences(reports)[1] == (
        "By step 100 it was raised to 0.138 (gain 13.8): the weights moved too little, at first 0.10 and at the end "
        "1.00 times the target."
    )


def test_lowered_because_the_weights_moved_too_much():
    reports = rounds(FALL, ratios=[4.0, *[2.0] * 9])
    (move,) = story.moves(reports)
    assert move.kind == "lowered"
    assert move.why == "the weights moved too much, at first 4.00 and at the end 2.00 times the target"


@pytest.mark.parametrize(
    ("argued", "gains", "said"),
    [
        (2.0, RISE, "the probe saw lasting progress and argued for a gain of 21.2"),
        (2.0, FALL, None),
        (0.5, RISE, None),
        (0.5, FALL, "the probe saw noise rather than progress and argued for a gain of 0.0471"),
        (1.1, RISE, None),
    ],
)
def test_what_the_probe_saw(argued, gains, said):
    """``argued`` times the gain in force in the round."""
    reports = rounds(gains, ratios=0.5 if gains is RISE else 2.0, argued=argued)
    (move,) = story.moves(reports)
    assert ("probe" in move.why) == (said is not None)
    assert said is None or move.why.endswith(f"target, and {said}")


def test_the_users_rate_was_believed():
    (kept,) = story.moves(rounds([1.05] * 10, ratios=1.0, trust=0.83))
    assert (kept.kind, kept.first, kept.last) == ("kept", 10, 100)
    assert kept.why == (
        "the weights moved as they should, 1.00 times the target, and the estimate, 1.16 times the given rate, could "
        "not be told apart from it (right with a probability of 83%)"
    )
    (left,) = story.moves(rounds(RISE, ratios=0.5, trust=[0.6 - 0.06 * k for k in range(10)]))
    assert left.why.endswith("and the probability that the given rate is right fell from 60% to 6%")
    (none,) = story.moves(rounds(RISE, ratios=0.5, trust=0.0))
    assert "given rate" not in none.why


def test_rest():
    reports = rounds([*RISE, *[RISE[-1]] * 5], ratios=0.9, rests_from=10)
    raised, rested = story.moves(reports)
    assert (raised.kind, rested.kind, rested.first) == ("raised", "rested", 110)
    assert story.sentences(reports)[2].startswith("From step 110 on it rested at 0.138 (gain 13.8): ")
    assert story.now(reports[-1]) == "gain 13.8, at rest"
    assert story.in_one_sentence(reports).endswith("; at rest from step 110 on, at 0.138 (gain 13.8).")


def test_a_round_that_was_undone_comes_between_the_moves():
    up = rounds([*RISE, RISE[-1] / 3, *[RISE[-1] / 3] * 4], ratios=0.9)
    up[10] = changed(up[10], rolled_back=True, complete=False, cause="the mean loss 9 is above all earlier ones")
    kinds = [(move.kind, move.last) for move in story.moves(up)]
    assert kinds == [("raised", 100), ("undone", 110), ("kept", 150)]
    assert (
        "The round that ended at step 110 was undone, and it became 0.046 (gain 4.6): the mean loss 9 is above all "
        "earlier ones." in story.sentences(up)
    )
    assert "1 rollback, the last at step 110" in story.in_one_sentence(up)
    assert story.now(up[10]) == "gain 4.6: round undone, the mean loss 9 is above all earlier ones"


def test_exclusions():
    reports = rounds([1.0] * 9)
    for k in range(7):
        reports[k] = changed(reports[k], excluded=(1,) if k else (0, 1))
    told = story.sentences(reports)
    assert "Replica 0 was not finite and left out of the average, then healed from the others, at step 10." in told
    assert any("Replica 1" in one and one.endswith("at steps 10, 20, 30, 40, 50 and 2 more.") for one in told)
    assert "replicas left out of 7 averages" in story.in_one_sentence(reports)


def test_other_hyperparameters():
    def of(centre, after):
        fixed = {"values": (0.1, 0.2), "effect": 0.0, "error": 0.0}
        return (HyperparameterReport(name="decay", centre=centre, next_centre=after, **fixed),)

    reports = rounds([1.0] * 2)
    moved = [changed(reports[0], hyperparameters=of(0.1, 0.15)), changed(reports[1], hyperparameters=of(0.15, 0.2))]
    assert "decay moved from 0.1 to 0.2." in story.sentences(moved)
    kept = [changed(report, hyperparameters=of(0.1, 0.1)) for report in reports]
    assert "decay stayed at 0.1." in story.sentences(kept)


def test_the_published_controller():
    (move,) = story.moves(rounds(RISE, hypergradient=(0.1,)))
    assert move.why == "replicas with higher learning rates had the lower training losses"
    (move,) = story.moves(rounds(FALL, hypergradient=(-0.1,)))
    assert move.why == "replicas with lower learning rates had the lower training losses"
    (move,) = story.moves(rounds(FALL, hypergradient=(0.1,)))
    assert move.why == ""


def test_a_gain_that_never_moves():
    reports = rounds([1.0] * 5)
    assert "From step 10 to 50 it stayed near 0.01 (gain 1)." in story.sentences(reports)
    assert story.in_one_sentence(reports) == "Peak learning rate 0.01 (gain 1) at the start."
    assert story.now(reports[-1]) == "gain 1"


def test_groups_with_gains_of_their_own_are_named():
    one, two = rounds(RISE, ratios=0.5), rounds(FALL, ratios=2.0)
    fields = ("schedule_lr", "gain", "next_gain", "base_lr", "replica_lr", "movement", "judgements", "hypergradient")
    both = [
        changed(a, groups=("body", "head"), **{f: getattr(a, f) + getattr(b, f) for f in fields})
        for a, b in zip(one, two, strict=True)
    ]
    assert story.groups_of(both) == [0, 1]
    told = story.sentences(both)
    assert told[1].startswith("body: By step 100 it was raised to")
    assert told[2].startswith("head: By step 100 it was lowered to")
    same = [changed(report, groups=("body", "head"), **{f: getattr(report, f) * 2 for f in fields}) for report in one]
    assert story.groups_of(same) == [0]
    assert not any("body" in one for one in story.sentences(same))


def test_a_restless_gain_is_told_in_few_moves():
    gains = [math.exp(0.4 * (-1) ** k + 0.02 * k) for k in range(200)]
    assert len(story.moves(rounds(gains, ratios=1.0))) <= 4


def test_turning_points():
    def kinds(*logs):
        return [move.kind for move in story.moves(rounds([math.exp(x) for x in logs], ratios=1.0))]

    assert kinds(0.5, 1.0, 1.5, 1.0, 0.5) == ["raised", "lowered"]
    assert kinds(-0.5, -1.0, 0.0, 1.0) == ["lowered", "raised"]
    assert kinds(0.05, 0.0, 0.05, 0.0, 1.0, 1.05, 1.0, 1.0) == ["raised"]
    assert kinds(1.0, 0.0, 1.0) == ["raised", "lowered", "raised"]


def test_no_value_breaks_it():
    """Whatever a file may hold: zeros, infinities and unknowns."""
    for value in (NAN, math.inf, 0.0, 1e-300):
        reports = rounds([1.0, 2.0, 3.0], ratios=value, argued=value, trust=value)
        odd = [changed(r, mean_loss=value, peak_lr=value, movement=(value,), base_lr=(value,)) for r in reports]
        assert all(isinstance(sentence, str) for sentence in story.sentences(odd))
        assert story.in_one_sentence(odd)
        assert story.now(odd[-1])


def test_what_is_kept_by_replica_is_not_needed():
    reports = rounds(RISE, ratios=0.5)
    assert story.sentences([reports[0], *map(story.slim, reports[1:])]) == story.sentences(reports)


def test_a_real_run_from_a_learning_rate_far_too_low():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    seen = []
    scheduler = hdet.OneCycleLR(
        optimizer, 1e-5, 200, model=model, auto_lr=True, spread=0.3, virtual_replicas=2, monitor=seen.append
    )
    data = torch.randn(64, 8)
    for _ in range(200):
        losses = []
        for part in scheduler.each(data.chunk(2)):
            losses.append((model(part) - part.sum(1, keepdim=True)).square().mean())
            (losses[-1] / 2).backward()
        optimizer.step()
        scheduler.step(losses)
        optimizer.zero_grad()
    told = story.sentences(seen)
    assert told[0].startswith("The peak learning rate was 1e-05 (gain 1) at the start, with 2 replicas, under 0.7 to")
    assert "it was raised to" in told[1]
    assert "the weights moved too little, at first 0.0" in told[1]
    assert any("it rested at" in sentence for sentence in told)
    assert story.in_one_sentence(seen).startswith("Peak learning rate 1e-05 (gain 1) at the start; raised ")
    assert seen[0].peak_lr == pytest.approx(1e-5)
    assert seen[0].judgements[0].target > seen[0].movement[0] > 0
    assert [report.judgements[0].rests for report in seen] == sorted(report.judgements[0].rests for report in seen)


def test_a_scheduler_says_where_it_is():
    model = torch.nn.Linear(2, 1)

    def built(kind, *args, **settings):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = kind(optimizer, *args, model=model, converge_every=2, **settings)
        for _ in range(3):
            optimizer.step()
            scheduler.step(1.0)
        return scheduler

    assert repr(built(hdet.OneCycleLR, 0.1, 20)) == "<hdet.OneCycleLR: 1 replica, step 3 of 20: gain 1>"
    ensemble = built(hdet.Ensemble, spread=0.25)
    assert repr(ensemble) == "<hdet.Ensemble: 1 replica, spread 0.25, step 3: gain 1>"
    plain = hdet.OneCycleLR(torch.optim.SGD(model.parameters(), lr=0.1), 0.1, 20)
    assert "OneCycleLR object at" in repr(plain)


def test_a_scheduler_says_how_the_gain_moves():
    reports = rounds(RISE, ratios=0.5)
    told = story.summary("hdet.OneCycleLR", reports[3], replicas=4, spread=0.3, step=40, total_steps=100)
    state = "gain 2.86, rising: weights move 0.50 times the target"
    assert told == f"<hdet.OneCycleLR: 4 replicas, spread 0.3, step 40 of 100: {state}>"
    still = story.now(changed(reports[3], gain=(2.0,), next_gain=(2.0,)))
    assert still == "gain 2, steady: weights move 0.50 times the target"
    assert story.now(rounds(FALL, ratios=2.0)[0]).startswith("gain 0.769, falling: weights move 2.00 times")
