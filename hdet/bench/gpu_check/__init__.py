"""``python -m hdet.bench.gpu_check``, which launch/gpu_check.sh starts: all that only a GPU can show, in ten minutes.

Parts, in the order in which they run (``--parts`` picks some):

- ``build``: compiles the native ops and loads them (:mod:`.build`).
- ``tests``: the tests that are marked ``gpu``.
- ``kernels``: pack and unpack against the card's copy bandwidth, foreach and per-tensor torch.
- ``captured``: a training step in a CUDA graph, replayed through rounds of hdet (:mod:`.captured`).
- ``nccl``: one process over NCCL whose micro-batches are virtual replicas (:mod:`.replicas`).
- ``two_processes``: two replicas on one card, over gloo.
- ``training``: a GPT in bf16 from 1/30, 1 and 4 times a tuned learning rate, with hdet and without (:mod:`.training`).

Each part is a process of its own, with a log of its own: one that fails, hangs or dies does not stop the others.
Results go to ``gpu_check.json`` and ``gpu_check.md`` after every part. A part that has passed on this device is not
repeated by the next call, unless ``--again`` asks for it. Without a GPU all runs on the CPU with small sizes, which
tries everything that needs no card and measures nothing.
"""
