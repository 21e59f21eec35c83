"""The parts that prompting methods are made of: plain PyTorch, no Dassl (``trainer.py`` excepted).

``backbone`` is the one door to CLIP weights, ``text`` makes text features out of prompts, ``synthetic`` makes
class-conditional images out of class names, ``selection`` holds the min-max loss and the selection rule,
``results`` writes and reads ``results.json``, ``inert`` reads the original CoOp's checkpoints without executing them,
``trainer`` is what every Dassl trainer of ours shares.
"""
