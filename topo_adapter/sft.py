"""TRL's supervised fine-tuning with a topology adapter: `from topo_adapter.sft import TopologySFTTrainer`."""

from trl import SFTTrainer

from .training.trainer import TopologyTrainerMixin


class TopologySFTTrainer(TopologyTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` for `peft_config=TopologyConfig(...)`.

    Beside what `DensityCallback` does in every trainer: the routers' auxiliary loss is scaled exactly as the main loss
    (fp16 too), they have a learning rate of their own beside other trained weights, checkpoints that are not whole
    are passed over, and model cards say how to load.
    """
