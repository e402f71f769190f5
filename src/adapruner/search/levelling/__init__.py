"""Levelling: parts that were removed whole are tried again, and heads and channels move from layers where they cost
little to layers where they cost much."""

from adapruner.search.levelling._channels import MovedChannels
from adapruner.search.levelling._heads import MovedHeads
from adapruner.search.levelling._level import Levelled, level
from adapruner.search.levelling._parts import KeptPart

__all__ = ["KeptPart", "Levelled", "MovedChannels", "MovedHeads", "level"]
