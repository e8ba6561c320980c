"""How torch functions use parameters: each file is a family of functions.

A rule for another function of torch goes into the file of its family (:mod:`.registry` says what a
rule is), and a function of one's own is taught by :func:`cl_optim.register_fisher_rule`.
"""
