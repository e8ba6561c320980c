"""Beside van de Ven's EWC, on his protocol: ``python -m bench.retention van-de-ven``.

Van de Ven, Tuytelaars & Tolias 2022 ("Three types of incremental learning", Nature Machine
Intelligence 4:1185): ten classes are learned in contexts of two, and what must be told of a test
sample is which of its context's classes it has (task-incremental: the context is known, and has a
head of its own), the same without knowing the context (domain-incremental), or which of all classes
so far (class-incremental). Every method begins with the same weights and sees the same batches.
"""
