"""Checkpoints: Hugging Face folders that load with and without this package."""

from adapruner.checkpoint._folder import (
    add_older_keys as add_older_keys,
    is_replaceable as is_replaceable,
    made_beside as made_beside,
    read_origin as read_origin,
    save_checkpoint as save_checkpoint,
    write_card as write_card,
)
