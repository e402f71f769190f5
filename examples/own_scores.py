"""Prunes by scores of your own: here, the norm of the weights that read each head or channel.

`--small` took 30 seconds on a busy core.
"""

import torch
from inputs import model, round_to

import adapruner

structure = adapruner.inspect(model)
# [outputs, inputs] of the projection that reads a block; a head is several inputs, a channel one.
weights = [model.get_parameter(block.row_wise.parameter) for block in structure.blocks]
norms = [w.norm(dim=0).view(block.groups, -1).sum(1) for w, block in zip(weights, structure.blocks, strict=True)]
scores = torch.cat(norms).detach().cpu()  # [groups]
plan = adapruner.PruningPlan.from_scores(structure, scores, ratio=0.2, round_to=round_to)
pruned = adapruner.cut(model, structure, plan)
print(f"{pruned.num_parameters():,} of {model.num_parameters():,} parameters, plan {plan.hash[:12]}")
