"""What ``cl-optim check`` does: load two models and texts, and compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cl_optim.retention.diagnosis.corpora import read_corpus
from cl_optim.retention.forgetting.compare import Comparison, Text, check_options, compare_models


def check_models(
    base: str, tuned: str, files: Sequence[Path], budget: float | None, length: int
) -> Comparison:
    """Compare a tuned model, or an adapter of peft, with its base on files.

    Args:
        base: A folder of transformers', or a name on the hub.
        tuned: Likewise; an adapter's folder, too.
        files: Text in UTF-8, each one document; or .jsonl, a record a document.
        budget: As for ``compare_models``.
        length: Likewise.

    Raises:
        OSError: Something cannot be read.
        ValueError: As for ``compare_models``; or the tokenizers differ.
    """
    check_options(budget, length)
    texts = {str(path): _texts(path) for path in files}
    import transformers

    load: Any = transformers.AutoTokenizer.from_pretrained
    tokenizer = load(base)
    if _has_tokenizer(tuned):
        other = load(tuned)
        if other.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizers of {base} and {tuned} differ ({len(tokenizer)} and {len(other)} "
                "tokens): bits of two vocabularies are no measure of what was forgotten; compare "
                "with a base whose tokenizer was extended alike."
            )
    before, now = _model(base), _model(tuned)
    return compare_models(before, now, tokenizer, texts, budget=budget, length=length)


def show(comparison: Comparison) -> None:
    """Print it as a table; needs rich."""
    from rich.console import Console

    Console().print(comparison, soft_wrap=True)


def _model(name: str) -> Any:
    import transformers

    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    return load(name).to("cuda" if torch.cuda.is_available() else "cpu")


def _has_tokenizer(name: str) -> bool:
    folder = Path(name)
    return not folder.is_dir() or any(folder.glob("tokenizer*"))


def _texts(path: Path) -> list[Text]:
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return [_text(item) for item in read_corpus(path)]
    try:
        return [path.read_text(encoding="utf-8-sig")]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}: must be UTF-8, but has the byte 0x{byte:02x}.") from None


def _text(item: Any) -> Text:
    if isinstance(item, dict):
        return str(item["text"])
    if isinstance(item, tuple):
        return item if isinstance(item[1], str) else str(item[0])
    return str(item)
