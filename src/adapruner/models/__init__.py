"""Models: their location, the architecture of their family, loading them, and their layers one at a time."""

from adapruner.models._architecture import register_architectures as register_architectures
from adapruner.models._loading import empty_model as empty_model
