"""Text to calibrate on: sources, their disjoint parts, and windows of tokens."""

from adapruner.calibration._reading import read_documents as read_documents
from adapruner.calibration._sources import parse_source as parse_source, register_sources as register_sources
