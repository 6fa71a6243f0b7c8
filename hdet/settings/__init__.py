"""The settings of an ensemble, each declared once: type, default, rule and meaning.

In: what :class:`hdet.OneCycleLR` and :class:`hdet.Ensemble` take by keyword, :class:`Settings`. Out: :class:`Resolved`,
complete and valid. The training program's configuration and the table in docs/settings.md are made from the same
declarations.
"""

from hdet.settings.declared import DECLARED, GROUPS, Setting, Settings, documentation
from hdet.settings.groups import Averaging, Exploration, Outer
from hdet.settings.resolve import Resolved, resolve, round_length

__all__ = [
    "DECLARED",
    "GROUPS",
    "Averaging",
    "Exploration",
    "Outer",
    "Resolved",
    "Setting",
    "Settings",
    "documentation",
    "resolve",
    "round_length",
]
