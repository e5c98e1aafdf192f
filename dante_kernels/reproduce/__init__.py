"""The papers' experiments, run again: what was published, what these kernels give, and what SGD gives at its best rate.

`dante reproduce` is the command. From a script, `runs.train` trains one network by one method; `problems.load` gives it the
data. `search` chooses rates on held-out training rows and runs many trainings side by side, `experiments` says which, and
`report` writes what came of them.
"""
