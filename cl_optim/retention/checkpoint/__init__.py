"""All that a run consists of, kept on disk, and the position in its data.

Public are ``Checkpoints``, its error and warning, ``Stateful`` and ``DataStream``, as names of
``cl_optim.retention``. It may import ``cl_optim.importance``, for files and their checksums, and
``cl_optim.ops``, and of ``cl_optim.optim`` what settles an optimizer; it knows no guard and no
buffer.
"""
