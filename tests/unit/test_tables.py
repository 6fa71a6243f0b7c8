"""Tables as text, to the letter."""

from hdet.monitor.tables import aligned, markdown

ROWS = [("run", "loss"), ("a", "1.25"), ("longer", "-")]


def test_aligned_columns_have_no_trailing_space():
    assert aligned(ROWS) == "run     loss\na       1.25\nlonger  -"


def test_markdown_with_and_without_padding():
    assert markdown(ROWS) == "| run    | loss |\n| ------ | ---- |\n| a      | 1.25 |\n| longer | -    |"
    assert markdown(ROWS, padded=False) == "| run | loss |\n|---|---|\n| a | 1.25 |\n| longer | - |"
    assert markdown([("a", "b")]) == "| a   | b   |\n| --- | --- |"
