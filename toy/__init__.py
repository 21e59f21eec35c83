"""The toy world: drawings of named things, the small CLIP pre-trained on them, and its weights."""
