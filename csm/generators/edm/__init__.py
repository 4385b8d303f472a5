"""EDM checkpoints (Karras et al. 2022): a reader that runs nothing, the networks, and the generator around them."""
