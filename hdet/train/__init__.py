"""The training program: ``torchrun --nproc-per-node=4 -m hdet.train --config configs/char_lm_demo.yaml``.

One YAML file is one run, and any field can be overridden on the command line (``--optimizer.max_lr 3e-3``).
``--hdet.spread 0`` turns the same run into its own baseline: torch's OneCycleLR under DistributedDataParallel.

Read in this order: :mod:`~hdet.train.config` (what can be set), :mod:`~hdet.train.trainer` (the loop),
:mod:`~hdet.train.optimization` (where hdet comes in), :mod:`~hdet.train.data`, :mod:`~hdet.train.models`;
:mod:`~hdet.train.processes` and :mod:`~hdet.train.stop` for how processes fail and end.

Exit status: 0 at the end of the run; 2 for a mistake of the user's: a bad configuration, a file that is missing,
damaged or cannot be written; 1 for any other error; 128 + the signal's number after SIGINT or SIGTERM (130 or 143),
when a checkpoint has been saved and ``--resume`` goes on from it. If one process fails, it prints why, and all end with
its status.

SIGINT (Ctrl-C) and SIGTERM stop the run at the end of the round, so that the resumed run is the uninterrupted one bit
for bit; see ``train.stop_within``. A second Ctrl-C ends it at once.
"""
