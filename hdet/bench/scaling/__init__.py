"""``python -m hdet.bench.scaling``: what a round costs with up to 10,000 replicas and 400 billion parameters.

Three things, which the output keeps apart:

- **a model**: bytes, memory and time of a round, from an alpha-beta model of the network (:mod:`.network`,
  :mod:`.costs`). Figures for clusters are the model's, with published constants of NVLink and InfiniBand.
- **a measurement of the model's form**: all-reduces among real processes over gloo, to which alpha and beta are fitted,
  and converges of hdet that the fit must predict (:mod:`.fit`).
- **a simulated fleet**: hdet's own code on up to 1,024 ranks, which are threads of one process: what its messages hold,
  and what a rank's processor does for them (:mod:`.fleet`).
"""
