"""The engine of a run: nodes that name what they need, the keys of what is kept, and a folder that holds it.

It knows no node of a run; the modules of `adapruner.run` declare them.
"""
