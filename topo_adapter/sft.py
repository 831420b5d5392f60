"""TRL's supervised fine-tuning with a topology adapter: `from topo_adapter.sft import TopologySFTTrainer`."""

from trl import SFTTrainer

from .training.trainer import TopologyTrainerMixin


class TopologySFTTrainer(TopologyTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` for `peft_config=TopologyConfig(...)`: the recommended way to train on the LM loss.

    Everything is TRL's but three things: a `TopologyCallback` is added if none is given, the router's auxiliary
    loss is scaled exactly as the main loss, and density, homotopy and temperature are logged.
    """
