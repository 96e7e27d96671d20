"""What device memory is held for."""

PARAMETERS, GRADIENTS, OPTIMIZER, KEPT = "parameters", "gradients", "optimizer", "kept weights"
ACTIVATIONS, TEMPORARY = "activations", "temporary"
KINDS = (PARAMETERS, GRADIENTS, OPTIMIZER, KEPT, ACTIVATIONS, TEMPORARY)
