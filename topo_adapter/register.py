"""Make PEFT know `PeftType.TOPOLOGY`.

PEFT has no plugin mechanism: its registry refuses names that are not members of the `PeftType` enum, so
the member is added here. Idempotent, and does nothing if PEFT ever ships the name itself.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from peft import PeftModel
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


def push_cards() -> None:
    """Make `PeftModel.push_to_hub` send a topology adapter's card: it puts the hub's, or an empty one, over what was
    saved. Cards of other methods' adapters are as before."""
    from .card import write_adapter_card
    from .config import TopologyConfig

    upload: Any = PeftModel._upload_modified_files
    if getattr(upload, "writes_cards", False):
        return

    @functools.wraps(upload)
    def with_card(self: PeftModel, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get("default")  # that of the folder; those of other names lie in folders below it
        if isinstance(config, TopologyConfig):
            write_adapter_card(config, Path(working_dir), repo_id)
        return upload(self, working_dir, repo_id, *args, **kwargs)

    with_card.writes_cards = True  # type: ignore[attr-defined]
    PeftModel._upload_modified_files = with_card


def register() -> None:
    """Register config and tuner with PEFT, and merged models with transformers."""
    from .checkpoint import register_merged
    from .config import TopologyConfig
    from .model import TopologyModel

    add_peft_type()
    register_merged()
    push_cards()
    if PeftType[NAME] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=TopologyConfig, model_cls=TopologyModel, prefix=TopologyModel.prefix
        )
