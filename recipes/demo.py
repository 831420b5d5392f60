"""The whole method on a small real model, in ten minutes on two CPU cores; on a GPU it uses it.

    python recipes/demo.py                                           # embedded SmolLM2-135M
    python recipes/demo.py --model Qwen/Qwen3-0.6B --kl_steps 200    # any hub id or local path

Trains an adapter in both stages, saves, loads and merges it, prints loss and seconds of the dense and the sparse
model, and asks both for facts that are hidden far back in a text. What it does stands in `topo_evaluation/demo.py`;
`topo demo` is the same without this file. Everything goes to `--output_dir`: `adapter/`, `results.jsonl`,
`routing.png`.
"""

from transformers import HfArgumentParser

from topo_evaluation.demo import DemoSettings, demonstrate

if __name__ == "__main__":
    (settings,) = HfArgumentParser(DemoSettings).parse_args_into_dataclasses()
    demonstrate(settings)
