"""Imported by the server that starts the processes of tests: they share what takes seconds to read."""

from adapruner.text.installed import python_functions

python_functions()
