"""Before training: how far new data are from what a model knows, and what that implies.

Public are ``diagnose``, ``read_corpus`` and what they return, as names of ``cl_optim.retention``;
the room is not called after the function, which would hide it. It knows neither models nor
optimizers, and imports no other room. rich is loaded where its console draws a ``Diagnosis``.
"""
