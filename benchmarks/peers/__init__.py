"""Is what a reader would pick instead faster, and right? Every peer on the same weights and data.

`make peers` installs what is compared (`pip install hessjax[peers]`) and runs all; `QUICK=1` takes small
sizes. A peer that is not installed is a row that says so. One file for each peer, `with_NAME.py`, with a
handful of functions of the same names; `problems.py` makes the networks; `worker.py` is the process that one
peer runs in; `__main__.py` asks them in turn.
"""
