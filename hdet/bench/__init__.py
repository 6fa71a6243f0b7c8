"""``python -m hdet.bench``: hdet against every alternative, in one run and in alternation.

Sections, in the order in which they run (``--sections`` picks some):

- ``kernels``: pack and unpack alone, against a memory copy of the same bytes and against torch (:mod:`.kernels`); on a
  GPU also a CUDA graph of a whole training step with its converge (:mod:`.graph`).
- ``step``: ``scheduler.step(loss)`` between converges against torch's OneCycleLR (:mod:`.steps`).
- ``virtual``: a step at the points of virtual replicas, against plain gradient accumulation (:mod:`.visits`).
- ``converge``: the average of a model over 2 and 4 processes, against the ways others do it (:mod:`.contenders`), over
  the tensor lists of :mod:`.shapes`. Every contender's result is checked against the true mean.
- ``overhead``: a whole training run, plain DDP against hdet (:mod:`.overhead`).
- ``traffic``: the bytes that a training step hands to collectives in each gradient mode, from a counter
  (:mod:`.traffic`).

Contenders take turns, in an order drawn anew every round, so that a slow moment of the machine meets them alike. A
ratio is taken within a round; the tables show medians over rounds, with quartiles. Above 1, hdet is faster. The
results go to ``bench.json`` (all samples) and ``bench.png``.
"""
