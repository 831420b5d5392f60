"""Make PEFT know `PeftType.TOPOLOGY`.

PEFT has no plugin mechanism: its registry refuses names that are not members of the `PeftType` enum, so
the member is added here. Idempotent, and does nothing if PEFT ever ships the name itself.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from .files import PEFT_TYPE as NAME


def add_peft_type() -> None:
    """Add the enum member; must run before a `TopologyConfig` is made."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.12 and newer look values up here too
        PeftType._hashable_values_.append(NAME)


def register() -> None:
    """Register config and tuner with PEFT, and merged models with transformers."""
    from .checkpoint import register_merged
    from .config import TopologyConfig
    from .model import TopologyModel

    add_peft_type()
    register_merged()
    if PeftType[NAME] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=TopologyConfig, model_cls=TopologyModel, prefix=TopologyModel.prefix
        )
