"""Checkpoints that are damaged, foreign, old, incomplete or of another moment; folders that cannot be written to."""

import io
import json
import os
import pickle
import random
import re
import resource
import sys
import warnings
import zipfile

import pytest
import sklearn.datasets
import torch

from hdet.monitor.base import read_jsonl
from hdet.train import __main__ as program
from hdet.train import checkpoint, compare
from hdet.train.config import ConfigError

TINY = ["--task.name=digits", "--model.channels=1", "--train.batch_size=2", "--train.eval_every=0"]
TINY += ["--train.eval_batches=1", "--train.total_steps=4", "--hdet.spread=0.2", "--train.log_every=1"]


def run(monkeypatch, log_dir, *arguments):
    """The exit status of ``python -m hdet.train``."""
    monkeypatch.setattr(sys, "argv", ["hdet.train", *TINY, f"--train.log_dir={log_dir}", *arguments])
    return program.main()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a checkpoint after two of four steps."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(monkeypatch, folder, "--train.stop_at=2") == 0
    return (folder / "checkpoint.pt").read_bytes()


def written(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def changed(saved, change):
    """The checkpoint with its state changed by a function."""
    state = torch.load(io.BytesIO(saved), weights_only=True)
    return written(change(state) or state)


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def archive(parts, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as target:
        for name, content in parts.items():
            target.writestr(name, content)
    return buffer.getvalue()


def compressed(saved):
    with zipfile.ZipFile(io.BytesIO(saved)) as source:
        return archive({name: source.read(name) for name in source.namelist()}, zipfile.ZIP_DEFLATED)


def legacy(saved):
    buffer = io.BytesIO()
    torch.save({"step": 1}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def without(name):
    def change(state):
        del state[name]

    return change


def wrong_step(state):
    state["step"] = 1


def other_shape(state):
    name = next(iter(state["model"]))
    state["model"][name] = state["model"][name][:1].repeat(3, *[1] * (state["model"][name].dim() - 1))


def other_dtype(state):
    state["model"] = {name: tensor.double() for name, tensor in state["model"].items()}


def other_name(state):
    state["model"]["x"] = state["model"].pop(next(iter(state["model"])))


def other_moments(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(7)


def fewer_groups(state):
    state["optimizer"]["param_groups"].pop()


def setting(section, name, value):
    def change(state):
        state["config"][section][name] = value

    return change


def put(name, value):
    def change(state):
        state[name] = value

    return change


DAMAGE = {
    "empty": (lambda saved: b"", "empty"),
    "truncated": (lambda saved: saved[: len(saved) // 2], "cut short"),
    "a byte missing": (lambda saved: saved[:-1], "damaged"),
    "garbage": (lambda saved: bytes(range(256)) * 8, "not written by torch.save"),
    "text": (lambda saved: b"step: 3\n", "not written by torch.save"),
    "a pickle": (lambda saved: pickle.dumps({"step": 1}), "not written by torch.save"),
    "torch's old format": (legacy, "not written by torch.save"),
    "another archive": (lambda saved: archive({"a.txt": "b"}), "not written by torch.save"),
    "compressed": (compressed, "compressed"),
    "a list": (lambda saved: written([1, 2]), "holds a list"),
    "a model": (lambda saved: written({"w": torch.ones(3)}), "lacks step, config"),
    "no step": (lambda saved: changed(saved, without("step")), "lacks step"),
    "no scheduler": (lambda saved: changed(saved, without("scheduler")), "lacks scheduler"),
    "older": (lambda saved: changed(saved, without("max_lr")), "older version"),
    "newer": (lambda saved: changed(saved, put("version", 2)), "layout 2"),
    "a step that is none": (lambda saved: changed(saved, put("step", -1)), "step=-1"),
    "a step that is a bool": (lambda saved: changed(saved, put("step", True)), "step=True"),
    "a step that is a tensor": (lambda saved: changed(saved, put("step", torch.ones(2))), "step="),
    "a bad learning rate": (lambda saved: changed(saved, put("max_lr", float("nan"))), "max_lr=nan"),
    "a config that is none": (lambda saved: changed(saved, put("config", [3])), "configuration"),
    "another step": (lambda saved: changed(saved, wrong_step), "scheduler's .* is 2, and the model's step is 1"),
    "another shape": (lambda saved: changed(saved, other_shape), "of another model"),
    "another dtype": (lambda saved: changed(saved, other_dtype), "float64"),
    "another name": (lambda saved: changed(saved, other_name), "missing|unknown"),
    "other moments": (lambda saved: changed(saved, other_moments), "exp_avg"),
    "fewer groups": (lambda saved: changed(saved, fewer_groups), "parameter groups"),
    "no optimizer": (lambda saved: changed(saved, put("optimizer", {})), "optimizer's state"),
    "no model": (lambda saved: changed(saved, put("model", {})), "missing"),
    "a scheduler that is none": (lambda saved: changed(saved, put("scheduler", {})), "tells of no step"),
    "another setting": (lambda saved: changed(saved, setting("optimizer", "max_lr", 0.5)), r"optimizer\.max_lr=0\.5"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_checkpoint_is_told_by_name(monkeypatch, tmp_path, capfd, saved, damage):
    make, said = DAMAGE[damage]
    path = tmp_path / "checkpoint.pt"
    content = make(saved)
    path.write_bytes(content)
    assert run(monkeypatch, tmp_path, "--resume") == 2
    told = capfd.readouterr().err
    assert str(path) in told
    assert "Traceback" not in told
    assert told.count("error: ") == 1
    assert re.search(said, told), told
    assert path.read_bytes() == content


def test_a_checkpoint_executes_and_makes_nothing(monkeypatch, tmp_path, capfd, saved):
    touched = tmp_path / "touched"
    for state in ({"step": Evil(touched)}, Evil(touched)):
        (tmp_path / "checkpoint.pt").write_bytes(written(state))
        assert run(monkeypatch, tmp_path, "--resume") == 2
    (tmp_path / "checkpoint.pt").write_bytes(changed(saved, put("more", torch.nn.Parameter(torch.ones(1)))))
    assert run(monkeypatch, tmp_path, "--resume") == 2
    assert "Traceback" not in capfd.readouterr().err
    assert not touched.exists()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path, saved):
    """torch's loader reads flipped tensor data without a word. 1000 of the file's bits."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(saved)
    whole = checkpoint.load(path, {})
    chance = random.Random(0)
    found = 0
    for bit in [*chance.sample(range(8 * len(saved)), 700), *range(8 * len(saved) - 300, 8 * len(saved))]:
        flipped = bytearray(saved)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of the archive's byte order
            try:
                state = checkpoint.load(path, {})
            except ConfigError as error:
                assert str(path) in str(error)  # noqa: PT017
                found += 1
            else:
                assert same(state, whole), bit
    assert found > 100


def test_a_flipped_bit_of_a_weight_is_found(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1, "config": {}, "w": torch.ones(1000)})
    content = bytearray(path.read_bytes())
    content[content.find(b"\x00\x00\x80\x3f" * 8) + 403] ^= 0x40
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"checkpoint\.pt .*damaged: the checksum of .*data/0.* is wrong"):
        checkpoint.load(path, {}, ())


# ------------------------------------------------------------------------------------------------------- the folder


FILES = ["metrics.jsonl", "rounds.jsonl", "summary.json", "summary.json.tmp", "checkpoint.pt", "checkpoint.pt.tmp",
         "find_lr.png"]  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_run_writes_through_nothing_that_stands_in_a_files_place(monkeypatch, tmp_path, capfd, name, kind):
    log_dir, target = tmp_path / "run", tmp_path / "target"
    log_dir.mkdir()
    target.write_text("precious")
    place = log_dir / name
    {"link": lambda: place.symlink_to(target), "fifo": lambda: os.mkfifo(place), "folder": place.mkdir}[kind]()
    assert run(monkeypatch, log_dir) == 2
    told = capfd.readouterr().err
    assert str(place) in told
    assert "Traceback" not in told
    assert target.read_text() == "precious"
    assert os.listdir(log_dir) == [name]


def test_a_links_folder_is_followed_and_what_is_written_in_it_cannot_be_guessed(monkeypatch, tmp_path):
    """``runs`` may be a link to a larger disk. TensorBoard opens whatever stands in its file's place: its name has
    64 random bits."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    assert run(monkeypatch, tmp_path / "run") == 0
    events = [name for name in os.listdir(tmp_path / "disk") if "tfevents" in name]
    assert len(events) == 1
    assert len(events[0].rpartition(".")[2]) == 16


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling", "device"])
def test_a_folder_that_cannot_be_made_is_told_by_name(monkeypatch, tmp_path, capfd, kind):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    places = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "dangling": tmp_path / "dangling",
              "device": "/dev/null"}  # fmt: skip
    assert run(monkeypatch, places[kind]) == 2
    told = capfd.readouterr().err
    assert str(places[kind]) in told
    assert "Traceback" not in told


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_told_by_name(monkeypatch, tmp_path, capfd):
    tmp_path.chmod(0o500)
    assert run(monkeypatch, tmp_path / "run") == 2
    assert f"{tmp_path} may not be written to" in capfd.readouterr().err


@pytest.mark.timeout(120)
@pytest.mark.parametrize("limit", [0, 100, 2000, 6000])
def test_a_full_disk_is_told_by_name(tmp_path, limit):
    """In a process of its own, whose files may not grow beyond a limit: as on a full disk, some write fails."""
    sklearn.datasets.load_digits()  # its imports write files
    output = tmp_path / "output.txt"
    child = os.fork()
    if child == 0:
        status = 99
        try:
            file = os.open(output, os.O_WRONLY | os.O_CREAT)
            reading, writing = os.pipe()  # which have no size
            if os.fork() == 0:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                os.close(reading)
                os.dup2(writing, 1)
                os.dup2(writing, 2)
                sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
                sys.argv = ["hdet.train", *TINY, f"--train.log_dir={tmp_path}/run"]
                status = program.main()
                os._exit(status)
            os.close(writing)
            while part := os.read(reading, 4096):
                os.write(file, part)
            status = os.waitstatus_to_exitcode(os.wait()[1])
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    told = output.read_text()
    assert os.waitstatus_to_exitcode(status) == 2, told
    assert f"{tmp_path}/run" in told
    assert "File too large" in told
    assert "Traceback" not in told


def test_lines_go_on_after_one_that_a_crash_cut_short(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, "--train.stop_at=2") == 0
    for name in ("metrics.jsonl", "rounds.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 3, "train_l')
    assert run(monkeypatch, tmp_path, "--resume") == 0
    for name in ("metrics.jsonl", "rounds.jsonl"):
        steps = {record["step"] for record in read_jsonl(tmp_path / name)}
        assert steps == {1, 2, 3, 4}, name


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", ["", "{", "3", "{}", '{"validation_loss": "x"}', "[" * 10_000])
def test_compare_tells_what_is_no_summary(tmp_path, capsys, content):
    (tmp_path / "summary.json").write_text(content)
    assert compare.main([str(tmp_path)]) == 2
    assert "summary.json" in capsys.readouterr().err
    (tmp_path / "summary.json").unlink()
    os.mkfifo(tmp_path / "summary.json")
    assert compare.main([str(tmp_path)]) == 2
    assert "FIFO" in capsys.readouterr().err


def test_reports_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "reports.jsonl"
    lines = [
        "3",
        "[]",
        '"step"',
        "{",
        '{"a": 1}',
        json.dumps({"step": 1, "a": 2}),
        "\udcff".encode("utf-8", "ignore").decode(),
    ]
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    assert read_jsonl(path) == [{"step": 1, "a": 2}]
