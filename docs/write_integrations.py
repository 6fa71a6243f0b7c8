"""``python docs/write_integrations.py``: writes the diffs of docs/guides/ and the table of docs/integrations.md anew.

A diff is between a script in examples/plain/ and the one of the same name in examples/. A cell of the table is the
number of a test in the list below it.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAGES = (ROOT / "docs" / "integrations.md", *sorted((ROOT / "docs" / "guides").glob("*.md")))

COLUMNS = (
    "fan-out", "probe", "evaluate", "save", "resume to the bit", "accumulation", "bf16", "FSDP2", "DeepSpeed",
)  # fmt: skip
PLAIN = "test_it_trains_as_the_plain_loop_does"
SAID = "test_accelerate.py::test_what_a_loop_has_forgotten_is_said_once_on_one_rank_with_the_line_to_add"
REFUSED = "refused, "
WAY_OUT = f"{REFUSED}test_what_cannot_work_is_refused_with_the_way_out"
ROWS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # Title: example, file of the tests, and a test for each column; one of another file with its name.
    "DDP": (
        "ddp",
        "test_replicas.py",
        (
            "test_learning_rates_follow_the_spread_from_the_first_step",
            "test_probe_processes.py::test_real_processes_do_what_the_simulation_does",
            SAID,
            SAID,
            "test_rank_0s_checkpoint_resumes_every_rank_bit_for_bit",
            f"test_accelerate.py::{PLAIN}",
            f"test_accelerate.py::{PLAIN}",
            "test_sharded.py::test_a_sharded_converge_is_the_mean_of_the_replicas",
            "test_deepspeed.py::test_learning_rates_differ_per_replica_and_not_per_shard",
        ),
    ),
    "Lightning": (
        "lightning_module",
        "test_lightning.py",
        (
            PLAIN,
            PLAIN,
            "test_validation_sees_the_mean_and_not_one_replica",
            "test_what_is_saved_is_the_mean_and_an_error_is_no_reason_to_wait_for_other_ranks",
            "test_a_run_that_was_resumed_in_the_middle_of_a_round_and_an_epoch_is_the_uninterrupted_one",
            "test_with_accumulation_the_loss_is_the_steps",
            "test_with_accumulation_the_loss_is_the_steps",
            "test_a_sharded_model_is_saved_and_resumed_with_its_probe",
            WAY_OUT,
        ),
    ),
    "Hugging Face Trainer": (
        "hf_trainer",
        "test_transformers.py",
        (
            PLAIN,
            PLAIN,
            "test_evaluation_sees_the_mean_and_not_one_replica",
            "test_adapters_of_a_language_model_are_averaged_and_saved",
            "test_a_resumed_run_is_the_uninterrupted_one",
            PLAIN,
            PLAIN,
            "test_dcp.py::test_fsdp2_through_the_trainer_resumes_with_its_probe",
            WAY_OUT,
        ),
    ),
    "accelerate": (
        "accelerate_loop",
        "test_accelerate.py",
        (
            PLAIN,
            PLAIN,
            SAID,
            "test_a_run_that_load_state_has_resumed_is_the_uninterrupted_one",
            "test_a_run_that_load_state_has_resumed_is_the_uninterrupted_one",
            PLAIN,
            PLAIN,
            "test_dcp.py::test_fsdp2_through_accelerate_resumes_with_its_probe",
            WAY_OUT,
        ),
    ),
    "FSDP2, DCP": (
        "fsdp2",
        "test_sharded.py",
        (
            "test_learning_rates_differ_per_replica_and_not_per_shard",
            "test_a_probe_of_sharded_replicas_sees_what_one_of_whole_models_sees",
            SAID,
            "test_dcp.py::test_the_state_has_one_structure_on_every_rank_and_at_every_time",
            "test_dcp.py::test_a_run_loaded_by_dcp_is_the_uninterrupted_one",
            "test_dcp.py::test_fsdp2_through_the_trainer_resumes_with_its_probe",
            "test_a_sharded_converge_is_the_mean_of_the_replicas",
            "test_a_sharded_converge_is_the_mean_of_the_replicas",
            f"{REFUSED}test_dcp.py::test_a_deepspeed_engine_is_refused",
        ),
    ),
}


def diff(name: str) -> str:
    """From examples/plain/NAME.py to examples/NAME.py."""
    plain, ours = ((folder / f"{name}.py").read_text(encoding="utf-8") for folder in (EXAMPLES / "plain", EXAMPLES))
    lines = difflib.unified_diff(plain.splitlines(), ours.splitlines(), n=1, lineterm="")
    return "\n".join("..." if line.startswith("@@") else line for line in list(lines)[2:])


def changed(name: str) -> int:
    """Lines that are written or changed, but for empty ones."""
    return sum(line.startswith("+") and bool(line[1:].strip()) for line in diff(name).splitlines())


def tests() -> list[str]:
    """``file::test`` of all tests in the table, in its order."""
    found = [_full(cell, file) for _, file, cells in ROWS.values() for cell in cells]
    return list(dict.fromkeys(found))


def table() -> str:
    """The table, and the list of its tests."""
    numbers = {test: i for i, test in enumerate(tests(), start=1)}
    rows = [["", "changed lines", *COLUMNS], ["---"] * (len(COLUMNS) + 2)]
    for title, (example, file, cells) in ROWS.items():
        told = [(REFUSED if cell.startswith(REFUSED) else "") + str(numbers[_full(cell, file)]) for cell in cells]
        rows.append([title, str(changed(example)), *told])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"{i}. `{test}`" for test, i in numbers.items())])


def written(page: str) -> str:
    """The page with its diffs and its table as they are now."""

    def section(match: re.Match[str]) -> str:
        kind, _, name = match[1].partition(" ")
        body = table() if kind == "table" else f"```diff\n{diff(name)}\n```"
        return f"<!-- {match[1]} -->\n\n{body}\n\n<!-- end -->"

    return re.sub(r"<!-- ((?:diff \w+)|table) -->\n.*?<!-- end -->", section, page, flags=re.DOTALL)


def _full(cell: str, file: str) -> str:
    test = cell.removeprefix(REFUSED)
    return test if "::" in test else f"{file}::{test}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
