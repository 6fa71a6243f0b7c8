"""Monitor: where the report of a converge goes.

In: a :class:`Report`, plain values that are the same on every rank. Out: a function's call, a line of JSON, curves
in TensorBoard.
"""

from hdet.monitor.base import Callback, JsonLines, Monitor, MonitorLike, as_monitors, read_jsonl
from hdet.monitor.report import HyperparameterReport, Report
from hdet.monitor.tensorboard import TensorBoard

__all__ = [
    "Callback",
    "HyperparameterReport",
    "JsonLines",
    "Monitor",
    "MonitorLike",
    "Report",
    "TensorBoard",
    "as_monitors",
    "read_jsonl",
]
