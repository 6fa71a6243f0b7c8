"""Monitor: where the report of a converge goes.

In: a :class:`Report`, plain values that are the same on every rank. Out: a function's call, a line of JSON, curves
in TensorBoard.
"""

from hdet.monitor.base import Callback, JsonLines, Monitor, MonitorLike, as_monitors, read_jsonl
from hdet.monitor.publisher import Publisher
from hdet.monitor.report import Converged, HyperparameterReport, Moment, Report, assemble
from hdet.monitor.tensorboard import TensorBoard

__all__ = [
    "Callback",
    "Converged",
    "HyperparameterReport",
    "JsonLines",
    "Moment",
    "Monitor",
    "MonitorLike",
    "Publisher",
    "Report",
    "TensorBoard",
    "as_monitors",
    "assemble",
    "read_jsonl",
]
