"""What goes into the trainers that people use: a module for each, loaded only where it is imported.

``EWCAdamW`` and ``GEM`` need no integration: they are torch optimizers, given to Hugging Face's
Trainer as ``optimizers=(optimizer, None)``, returned by Lightning's ``configure_optimizers()``, and
prepared by Accelerate. What Accelerate and the Trainer wrap them in (``trainer.optimizer``) has
them as its ``.optimizer``: call ``consolidate()`` and ``remember()`` there.

Public are the guard in three of them, ``huggingface.RetentionCallback``,
``lightning.RetentionCallback`` and ``accelerate.retention_guard``, which import
``cl_optim.retention`` only (``huggingface`` also ``accelerate``, which Trainer wraps optimizers
with); and ``avalanche.EWCPlugin`` and ``avalanche.GEMPlugin``, which import ``fisher`` and
``optim``: Avalanche's strategies say where a task ends, and have its data.
"""
