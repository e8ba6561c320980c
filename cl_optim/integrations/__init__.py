"""The guard in the trainers that people use: one module for each, loaded only where it is imported.

``EWCAdamW`` and ``GEM`` need no integration: they are torch optimizers, given to Hugging Face's
Trainer as ``optimizers=(optimizer, None)``, returned by Lightning's ``configure_optimizers()``, and
prepared by Accelerate. What Accelerate and the Trainer wrap them in (``trainer.optimizer``) has
them as its ``.optimizer``: call ``consolidate()`` and ``remember()`` there.

Public are ``huggingface.RetentionCallback``, ``lightning.RetentionCallback`` and
``accelerate.retention_guard``. It imports ``cl_optim.retention`` only; ``huggingface`` also
``accelerate``, which Trainer wraps optimizers with.
"""
