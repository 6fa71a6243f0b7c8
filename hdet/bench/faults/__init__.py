"""The fault test: what happens to runs whose processes, files, settings and values are not as they should be.

Every module of this package that defines ``run(share, seed) -> Outcome`` is a section; :mod:`.sections` finds them.
"""
