"""Operations on one model, dense or pruned, outside of a pruning run; and the report of a run."""
