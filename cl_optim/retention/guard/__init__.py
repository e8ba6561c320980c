"""During training: old tasks are evaluated, and something is done where one is forgotten.

Public is what ``cl_optim.retention`` takes from here. It may import ``cl_optim.optim`` (GEM, whose
closures a roll-back gives back), ``cl_optim.retention.checkpoint``, ``cl_optim.importance`` and
``cl_optim.ops``. rich is loaded where its console draws.
"""
