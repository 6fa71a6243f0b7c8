"""The report of a run: one HTML file that says in words and charts what happened, and why.

In: the files of a run, ``rounds.jsonl`` and, from the training program, ``metrics.jsonl`` and ``summary.json``
(:mod:`hdet.report.run`). Out: a page that needs no network (:mod:`hdet.report.page`). ``hdet report RUN_DIR``.
"""

from hdet.report.page import page, write
from hdet.report.run import Run, place, read

__all__ = ["Run", "page", "place", "read", "write"]
