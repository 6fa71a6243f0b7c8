"""The command line: plain values that are compared with the dataclasses, and copied."""

import contextlib
import os
import sys
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any, Literal

import pytest
import yaml

from hdet.bench.faults import configs
from hdet.train import __main__ as program
from hdet.train import annotations, command_line
from hdet.train.config import Config, ConfigError, parse


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Of another module, as controllers are."""

    number: float = 0.5
    """A number."""
    pair: tuple[float, ...] = (1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    whole: Annotated[int | None, "anything"] = None
    choice: Literal["a", "b"] | bool = True
    text: str | None = None
    names: dict[str, float] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def built(tree):
    return command_line.build(Outer, tree)


def test_values_are_compared_with_annotations():
    tree = {"whole": 3, "choice": "b", "text": "x", "names": {"a": 1}, "anything": {"a": [1, {"b": None}]}}
    found = built({**tree, "inner": {"number": 2, "pair": [1]}})
    assert found == Outer(**{**tree, "names": {"a": 1.0}}, inner=Inner(number=2.0, pair=(1.0,)))
    assert type(found.inner.number) is type(found.names["a"]) is float


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"whole": True}, "whole=True. Must be a whole number or null"),
        ({"whole": 1.0}, "whole=1.0"),
        ({"whole": "1"}, "whole=1"),
        ({"whole": 2**63}, "below 2"),
        ({"choice": "c"}, "choice=c. Must be a, b or true or false"),
        ({"choice": 1}, "choice=1"),
        ({"text": 3}, "text=3"),
        ({"text": "\0"}, "zero byte"),
        ({"names": {"a": "x"}}, r"names\.a=x. Must be a number"),
        ({"names": {"a": True}}, "names={'a': True}. Must be a mapping of names to values, each a number"),
        ({"names": [1]}, "names="),
        ({"anything": {"a": {"b": float("nan")}}}, "Must be finite"),
        ({"anything": {"a": {"class_path": "os.system"}}}, r"anything\.a\.class_path"),
        ({"anything": {"a": [{"init_args": {}}]}}, "init_args"),
        ({"inner": {"number": float("inf")}}, r"inner\.number=inf. Must be finite"),
        ({"inner": {"number": 10**400}}, "Must be finite"),
        ({"inner": {"pair": 3}}, r"inner\.pair=3. Must be a list, each a number"),
        ({"inner": {"pair": [None]}}, r"inner\.pair"),
    ],
)
def test_a_value_of_another_type_is_named(tree, named):
    with pytest.raises(ConfigError, match=named):
        built(tree)


def test_a_dataclass_made_at_run_time_is_a_section_too():
    made = make_dataclass("Made", [("a", int, field(default=1, metadata={"doc": "What it is."}))])
    assert command_line.build(made, {"a": 2}) == made(a=2)
    assert annotations.texts(made) == {"a": "What it is."}


def test_the_parts_of_a_mapping_can_be_set_on_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("schedule: {name: cosine, options: {warmup_steps: 3, x: 1}}")
    options = parse([f"--config={file}", "--schedule.options.warmup_steps=4", "--schedule.options.y", "true"]).schedule
    assert options.options == {"warmup_steps": 4, "x": 1, "y": True}
    assert parse([f"--config={file}", "--schedule.options={z: 1}"]).schedule.options == {"z": 1}
    assert parse(["--hdet={spread: 0.3}", "--hdet.seed=4"]).hdet.seed == 4


def test_text_stays_text():
    config = parse(["--task.name=text", "--task.path=123", "--train.log_dir=true"])
    assert (config.task.path, config.train.log_dir) == ("123", "true")
    assert parse(["--task.path=null"]).task.path is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["x"], "unrecognized arguments: x"),
        (["--"], "unrecognized"),
        (["--train.seed"], "--train.seed needs a value"),
        (["--train.seed", "--resume"], "--train.seed needs a value"),
        (["--train.seed.x=1"], "train.seed is a value"),
        (["--train.stepz=1"], "unrecognized arguments: --train.stepz"),
        (["--train.total_step=1"], "Did you mean train.total_steps"),
        (["--train=3"], "train=3. Must be a section"),
        (["--hdet.posterior=os.system"], "hdet.posterior=os.system. Must be a section"),
        (["--hdet.posterior.class_path=os.system"], "unrecognized"),
        (["--hdet.posterior.help=os"], "unrecognized"),
        (["--schedule.options.x={class_path: os.system}"], "class_path"),
        (["--schedule.options.class_path=os.system"], "class_path"),
        (["--schedule.options.x.class_path=os.system"], "class_path"),
        (["--schedule.options=!!python/name:os.system"], "not allowed"),
        (["--hdet.hyperparameters.class_path=1"], "class_path"),
        (["--schedule.options=&a {b: *a}"], "alias"),
        (["--config="], "config"),
        (["--config=\0"], "config"),
        (["--train.log_dir="], "train.log_dir"),
        (["--train.stop_within=-1"], "train.stop_within"),
        (["--schedule.final_div_factor=0"], "schedule.final_div_factor"),
        (["--optimizer.max_lr=.inf"], "optimizer.max_lr"),
        (["--model.n_embd=1000000000000"], "model.n_embd"),
    ],
)
def test_a_bad_argument_is_named(arguments, named):
    with pytest.raises(ConfigError, match=named):
        parse(arguments)


BOMB = "{a0: &a0 [1, 1], " + ", ".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)) + "}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["train.seed", "task.path", "hdet.two_slope", "hdet.rollback", "optimizer.betas"])
def test_no_value_is_opened_imported_or_read_once_more(monkeypatch, tmp_path, events, name):
    """In the file the value is text, whatever it says; on the command line it is what it says, if it may."""
    other, file = tmp_path / "other.yaml", tmp_path / "run.yaml"
    other.write_text("{}")
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("HDET_TRAIN__SEED", "9")
    section, _, setting = name.partition(".")
    for value in (BOMB, f"[1, '{BOMB}']", str(other), "-", "this.s", "!!python/name:this.s", "{class_path: this}"):
        file.write_text(yaml.safe_dump({section: {setting: value}}))
        for given in (f"--config={file}", f"--{name}={value}"):
            with events() as seen:
                try:
                    told = f"task.path={parse(['--task.name=text', '--task.path=x', given]).task.path}"
                except ConfigError as error:
                    told = str(error)
            assert name in told
            assert name != "task.path" or told == f"task.path={value}"
            assert set(seen) <= {str(file)}
    assert parse([]).train.seed == 0
    assert "this" not in sys.modules


@pytest.fixture
def events():
    """What Python's audit hook hears of files and imports."""
    heard, hears = [], [False]
    parse([])  # imports what it needs

    def hear(event, args):
        if hears[0] and event in ("open", "import") and isinstance(args[0], str):
            heard.append(args[0])

    sys.addaudithook(hear)

    @contextlib.contextmanager
    def listen():
        heard.clear()
        hears[0] = True
        try:
            yield heard
        finally:
            hears[0] = False

    return listen


@pytest.mark.timeout(60)
def test_a_config_that_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, said in ((tmp_path / "fifo", "FIFO"), (tmp_path, "directory"), (tmp_path / "x", "No such file")):
        with pytest.raises(ConfigError, match=said):
            parse([f"--config={path}"])
    for place in ("--task.path", "--task.val_path"):
        with pytest.raises(ConfigError, match=r"task\.(val_)?path=.*FIFO"):
            program._train(parse(["--task.name=tokens", f"{place}={tmp_path}/fifo"]))


def test_a_model_that_no_machine_can_hold_is_named_before_it_is_tried(monkeypatch, tmp_path, capsys):
    for more in (
        ["--model.n_embd=65536", "--model.n_layer=4096"],
        ["--train.batch_size=1000000", "--model.n_layer=999"],
    ):
        monkeypatch.setattr(sys, "argv", ["hdet.train", f"--train.log_dir={tmp_path}/run", *more])
        assert program.main() == 2
        assert "GiB" in capsys.readouterr().err


def test_help_tells_of_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name} " in told for name, _ in annotations.settings(Config))
    assert "Seeds initial parameters, batches and dropout." in told
    assert "at 0x" not in told
    assert parse([]) == Config()


def test_generated_configurations_start_or_are_refused_by_name():
    """A tenth of the fault test's section."""
    outcome = configs.run(0.1, seed=0)
    assert outcome.tried == 50
    assert not outcome.failures, outcome.failures[0]
    assert 10 < sum(outcome.refused.values()) < 45
