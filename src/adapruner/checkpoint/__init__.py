"""Checkpoints: Hugging Face folders that load with and without this package, and uploads."""

from adapruner.checkpoint._folder import (
    add_older_keys as add_older_keys,
    is_replaceable as is_replaceable,
    made_beside as made_beside,
    read_origin as read_origin,
    save_checkpoint as save_checkpoint,
    write_card as write_card,
)
from adapruner.checkpoint._hub import check_push as check_push, push as push
