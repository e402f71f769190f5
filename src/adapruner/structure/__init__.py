"""The removable parts of a model: blocks of groups, and the tensor slices that belong to each group.

A *group* is the smallest thing that can be removed: a KV group (a key/value head with its query heads), a query head, a
feed-forward channel, or an expert. A *block* is all groups of one kind in one layer. A *vector* is one row or column of
a weight matrix that is removed with a group, or one expert in a stack of matrices. An *input* is one input of a
row-wise projection (attention output, feed-forward down): one number per token that is removed with a group. Groups,
vectors and inputs are numbered over the whole model in the order of `Structure.blocks`, so that statistics and scores
are flat tensors.
"""
