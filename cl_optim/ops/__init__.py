"""The operators: a file for each family says what it computes, and who computes it where.

The files of a family are alike (the step's calls its ``X`` and ``X_reference`` ``fused`` and
``foreach``). First comes the schema of each operator with its fake (:func:`library.define`),
so that ``torch.ops.cl_optim.X`` exists with or without compiled kernels. Then ``X``, which checks
its arguments and asks :func:`library.choose` who computes them: a kernel of ``csrc``, which
registers itself with the operator when it is loaded; one in Triton (``*_triton.py`` launches it,
``*_triton_kernels.py`` holds it, ``*_triton_tiles.py`` chooses its tiles); or ``X_reference``,
which comes after it and is plain PyTorch for any device. Where the kernel is in Triton, ``X``
itself is the operator's CUDA implementation, and calls the launch: through the dispatcher, a
thousand tensors would take half a millisecond more.

``formats.py`` says how state is stored; ``checks.py``, ``passes.py``, ``capture.py`` and
``warn.py`` are what every room uses.

Everything here is internal: :mod:`cl_optim.functional` is the public face. Of the package, files
here import others of this folder alone; Triton they import where a kernel is launched.
"""
