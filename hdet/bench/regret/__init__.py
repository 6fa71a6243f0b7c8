"""``python -m hdet.bench.regret``: what a wrong learning rate costs, with hdet and with what else spares its tuning.

Every contender (:mod:`.contenders`) trains every workload (:mod:`.workloads`) from several starts: a max_lr that is a
multiple of the tuned one. The oracle of a workload is the lowest loss of OneCycle over all its starts, and half and
twice the tuned max_lr, on average over the seeds. Regret is ``loss / oracle - 1``, of final validation losses: 0 is as
good as a search. The tables (:mod:`.table`) show its mean over the seeds.

Each run is kept in ``runs.jsonl`` when it ends, and is not made again (:mod:`.runs`). The results go to
``regret.json`` and ``regret.png``. ``python -m hdet.bench.regret.summary`` shows means over workloads, with standard
errors.

The default controller's constants are fitted on other runs: ``python -m hdet.bench.regret.collect`` makes them, and
``python -m hdet.bench.regret.fit`` fits.
"""
