"""Samples of earlier tasks, in memory or on disk, mixed into what is learned now.

Public are ``ReplayBuffer`` and ``MixedLoader``, as names of ``cl_optim.retention``. It may import
``cl_optim.importance``, for files and their checksums, and ``cl_optim.ops``; it knows no guard and
no checkpoint.
"""
