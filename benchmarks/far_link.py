"""The picture of the front page: a link over a thousand tokens that the shipped adapter's tree finds.

    python -m benchmarks.far_link

Writes docs/far_link.png and prints its caption; on a CPU. The text says a ship's name, then comes a page of Moby-Dick
(an evaluation text, which no adapter is trained on), then the question.
"""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import topo_adapter  # noqa: F401  # registers the adapter type
from topo_adapter import viz
from topo_evaluation.embedded import smollm2
from topo_evaluation.texts import EVALUATION

ROOT = Path(__file__).parents[1]
FACT = "The name of the ship was the Golden Harvest.\n\n"
QUESTION = "\n\nQuestion: What was the name of the ship?\nAnswer: The name of the ship was the Golden Harvest."
START, CHARACTERS = 200_000, 4_300  # of Moby-Dick, about 980 tokens


def passage() -> str:
    """The fact, whole paragraphs of Moby-Dick, the question and its answer."""
    read = EVALUATION["moby_dick"].local
    assert read is not None  # it lies in the repository
    (book,) = read()
    page = book[START : START + CHARACTERS]
    return FACT + page[page.index("\n\n") + 2 : page.rindex(".") + 1] + QUESTION


def main() -> None:
    name = smollm2()
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(name), str(ROOT / "examples" / "smollm2-135m-topology")
    )
    picture = viz.far_link(model.eval(), AutoTokenizer.from_pretrained(name), passage())
    picture.save(ROOT / "docs" / "far_link.png", dpi=200)
    print(picture.caption)


if __name__ == "__main__":
    main()
