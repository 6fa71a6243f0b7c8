"""The training program: ``torchrun --nproc-per-node=4 -m hdet.train --config configs/char_lm_demo.yaml``.

One YAML file is one run, and any field can be overridden on the command line (``--optimizer.max_lr 3e-3``).
``--hdet.spread 0`` turns the same run into its own baseline: torch's OneCycleLR under DistributedDataParallel.

Read in this order: :mod:`~hdet.train.config` (what can be set), :mod:`~hdet.train.trainer` (the loop),
:mod:`~hdet.train.optimization` (where hdet comes in), :mod:`~hdet.train.data`, :mod:`~hdet.train.models`.

Exit status: 0 at the end of the run, 2 for a bad configuration, 128 + the signal's number after SIGINT or SIGTERM (130
or 143), when a checkpoint has been saved and ``--resume`` goes on from it.
"""
