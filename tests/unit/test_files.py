"""Files from elsewhere: plain values, regular files, no links."""

import json
import os
import socket
import stat

import pytest
import yaml

import hdet
from hdet import files
from hdet.explore.prior import Prior
from hdet.files import plain
from hdet.monitor.base import read_jsonl

BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1e-3", {"a": 1e-3}),
        ("a: [1, -2, 0x10, 1_000, .5, 1., 1e400]", {"a": [1, -2, 16, 1000, 0.5, 1.0, float("inf")]}),
        ("a: [yes, Off, null, ~, x]", {"a": [True, False, None, None, "x"]}),
        ("a: [2020-01-01, 1:30, 010]", {"a": ["2020-01-01", "1:30", "010"]}),
        ("a: &x {b: 1}\nc: {<<: *x, d: 2}\ne: *x", {"a": {"b": 1}, "c": {"b": 1, "d": 2}, "e": {"b": 1}}),
        ("", None),
    ],
)
def test_yaml_is_plain_values(text, value):
    assert plain.parse_yaml(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &x [*x]", "alias stands inside"),
        ("a: &x {b: *x}", "alias stands inside"),
        ("&x a: {<<: {b: *x}}", None),
        (BOMB, "More than 20000 values"),
        ("[" * 5000, "nested too deeply"),
        ("[" * 60 + "]" * 60, "Nested more than 50 deep"),
        ("a: !!python/object/apply:os.system [x]", "tag .* is not allowed"),
        ("a: !!python/name:os.system", "tag .* is not allowed"),
        ("a: !!binary aGk=", "tag .* is not allowed"),
        ("a: !x 3", "tag .* is not allowed"),
        ("a: {class_path: os.system}", "class_path"),
        ("a: [{init_args: {}}]", "init_args"),
        ("a: 1\na: 2", "appears twice"),
        ("1: 2", "no text"),
        ("a: {", "No YAML"),
        ("a: 1\n--- \nb: 2", "No YAML"),
        ("\0", "No YAML"),
        ("a: " + "9" * 5000, "is no int"),
        ("<<: 3", "needs a mapping"),
    ],
)
def test_other_yaml_is_refused(text, said):
    if said is None:
        assert plain.parse_yaml(text) is not None
        return
    with pytest.raises(ValueError, match=said):
        plain.parse_yaml(text)


def special_files(folder):
    """One of each kind that is no regular file."""
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    here = os.getcwd()
    os.chdir(folder)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    os.chdir(here)
    (folder / "device").symlink_to("/dev/zero")
    return {"a FIFO": "fifo", "a directory": "folder", "a socket": "socket", "a device": "device"}


READERS = {
    "text": files.read_text,
    "yaml": files.read_yaml,
    "json": files.read_json,
    "prior": Prior.load,
    "found schedule": hdet.FoundSchedule.load,
    "reports": read_jsonl,
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("reader", READERS)
def test_reading_what_is_no_regular_file_is_an_error_and_no_hang(tmp_path, reader):
    for kind, name in special_files(tmp_path).items():
        with pytest.raises(ValueError, match=rf"{name} is {kind}"):
            READERS[reader](tmp_path / name)
    with pytest.raises((FileNotFoundError, ValueError), match="missing"):
        READERS[reader](tmp_path / "missing")


@pytest.mark.parametrize("reader", ["text", "yaml", "json", "prior", "found schedule"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"[", b"a" * (17 * 2**20), b"3", b"[" * 10_000])
def test_reading_garbage_is_an_error_that_names_the_file(tmp_path, reader, content):
    path = tmp_path / "garbage"
    path.write_bytes(content)
    if (reader, content) in (("text", b""), ("yaml", b""), ("yaml", b"3"), ("json", b"3")) or (
        reader == "text" and len(content) < 2**20 and content[0] < 128
    ):
        READERS[reader](path)
        return
    with pytest.raises(ValueError, match=r"garbage"):
        READERS[reader](path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("append", [True, False])
def test_writing_through_a_link_or_into_a_fifo_is_an_error_and_no_hang(tmp_path, append):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in (*special_files(tmp_path).values(), "link", "dangling"):
        with pytest.raises(ValueError, match=rf"{name} is (a|an) "):
            files.open_to_write(tmp_path / name, append=append)
        with pytest.raises(ValueError, match=rf"{name} is (a|an) "):
            files.write_at_once(tmp_path / name, lambda file: file.write(b"x"))
        with pytest.raises(ValueError, match=rf"{name} is (a|an) "):
            files.write_at_once(tmp_path / "new", lambda file: file.write(b"x"), beside=name)
    assert target.read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "new").exists()


def test_a_fifo_that_somebody_reads_is_not_written_to(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(ValueError, match="FIFO"):
        files.open_to_write(tmp_path / "fifo", append=True)
    assert os.read(reader, 10) == b""
    os.close(reader)


def test_a_file_is_written_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.write_at_once(path, lambda file: file.write(b"old"))

    def fails(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_at_once(path, fails)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_names_of_temporary_files_cannot_be_guessed(tmp_path):
    seen = set()
    for _ in range(3):
        files.write_at_once(tmp_path / "file", lambda file: seen.add(file.name if isinstance(file.name, str) else ""))
        files.write_at_once(tmp_path / "file", lambda file: seen.update(os.listdir(tmp_path)))
    assert len(seen - {"", "file"}) == 3


def test_a_tree_with_a_link_in_it_is_refused(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    files.check_tree(tmp_path / "a")
    files.check_tree(tmp_path / "missing")
    (tmp_path / "a" / "b" / "c").symlink_to("/")
    with pytest.raises(ValueError, match="symbolic link"):
        files.check_tree(tmp_path / "a")
    (tmp_path / "d").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match="d is a symbolic link"):
        files.check_tree(tmp_path / "d")


def test_kinds_of_files_have_names():
    kinds = {stat.S_IFREG: "a regular file", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    assert {files.kind_of(mode) for mode in kinds} == set(kinds.values())


@pytest.mark.parametrize(
    "text",
    [
        "gains: {a: 0}",
        "gains: {a: -1}",
        "gains: {a: .nan}",
        "gains: {a: .inf}",
        "gains: {a: true}",
        "gains: {a: x}",
        "gains: {a: [1]}",
        "gains: &a {a: *a}",
        f"gains: {{a: {10**400}}}",
        "gains: {a: 1}\nhyperparameters: {b: .nan}",
        "gains: {a: {class_path: os.system}}",
        "gains: 3",
        "losses: {}",
        "3",
        BOMB,
    ],
)
def test_a_prior_with_other_values_is_refused_by_the_files_name(tmp_path, text):
    path = tmp_path / "prior.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"prior\.yaml"):
        Prior.load(path)


def test_a_prior_is_written_through_no_link(tmp_path):
    prior = Prior({"group0": 2.0}, {"weight_decay": 0.1})
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(ValueError, match="symbolic link"):
        prior.save(tmp_path / "link")
    prior.save(tmp_path / "prior.yaml")
    assert Prior.load(tmp_path / "prior.yaml") == prior
    assert yaml.safe_load((tmp_path / "prior.yaml").read_text())["gains"] == {"group0": 2.0}


FOUND = hdet.FoundSchedule(("a", "b"), (0, 5, 9), ((0.1, 0.2, 0.3), (0.0, 1.0, 0.5)))


def test_any_flipped_bit_of_a_found_schedule_is_found_or_changes_nothing(tmp_path):
    path = tmp_path / "found.json"
    FOUND.save(path)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = hdet.FoundSchedule.load(path)
        except ValueError as error:
            assert "found.json" in str(error)  # noqa: PT017
        else:
            # An unknown spelling of the digest's own key: the schedule itself is whole.
            assert found == FOUND


@pytest.mark.parametrize(
    "change",
    [
        {"lrs": [[0.1, 0.2, -0.3], [0, 1, 0.5]]},
        {"lrs": [[0.1, 0.2, True], [0, 1, 0.5]]},
        {"lrs": [[0.1, 0.2, "x"], [0, 1, 0.5]]},
        {"lrs": [[0.1, 0.2, 1e999], [0, 1, 0.5]]},
        {"lrs": [[0.1, 0.2], [0, 1, 0.5]]},
        {"lrs": 3},
        {"lrs": [3, 4]},
        {"steps": [0, 5, 5]},
        {"steps": [0, 5.5, 9]},
        {"steps": []},
        {"steps": None},
        {"groups": ["a"]},
        {"groups": [1, 2]},
        {"groups": []},
        {"format": "hdet schedule 9"},
        {"class_path": "os.system"},
    ],
)
def test_a_found_schedule_with_other_values_is_refused_by_the_files_name(tmp_path, change):
    path = tmp_path / "found.json"
    FOUND.save(path)
    content = json.loads(path.read_text()) | change
    del content["digest"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"found\.json"):
        hdet.FoundSchedule.load(path)


def test_a_found_schedule_may_be_written_by_hand(tmp_path):
    path = tmp_path / "found.json"
    FOUND.save(path)
    content = json.loads(path.read_text())
    content["lrs"][0][0] = 0.15
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="remove its digest"):
        hdet.FoundSchedule.load(path)
    del content["digest"]
    path.write_text(json.dumps(content))
    assert hdet.FoundSchedule.load(path).lr(0) == 0.15
