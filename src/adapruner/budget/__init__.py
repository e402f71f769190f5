"""How much each block loses, and the plan: which groups are kept."""
