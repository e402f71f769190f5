"""What users call: from a model and options to a pruned, recovered, evaluated or exported one."""
