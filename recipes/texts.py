"""Fetch the training texts and list all texts.

python recipes/texts.py                             # fetch what is missing into .texts, list everything
python recipes/texts.py --tokenizer embedded        # and count tokens
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import AutoTokenizer, HfArgumentParser

from topo_evaluation.embedded import source
from topo_evaluation.texts import FOLDER, SPLITS, documents, fetch


@dataclass
class TextsArguments:
    folder: str = field(default=FOLDER, metadata={"help": "Where the training texts are kept."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Count tokens with this tokenizer: 'embedded', a hub id or a local path."}
    )


def main(arguments: TextsArguments) -> None:
    fetch(folder=arguments.folder)
    tokenizer = None
    if arguments.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(source(arguments.tokenizer))
    print(f"{'text':16}{'split':12}{'kind':15}{'documents':>10}{'MB':>8}{'tokens':>12}  terms")
    for split, texts in SPLITS.items():
        for name, text in texts.items():
            found = documents(name, arguments.folder)
            size = sum(len(document.encode("utf-8")) for document in found) / 1e6
            tokens = "" if tokenizer is None else f"{sum(map(len, tokenizer(found, verbose=False).input_ids)):,}"
            print(f"{name:16}{split:12}{text.kind:15}{len(found):10}{size:8.2f}{tokens:>12}  {text.terms}")


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(TextsArguments).parse_args_into_dataclasses()
    main(parsed)
