"""The parts that prompting methods are made of: plain PyTorch, no Dassl (``trainer.py`` and ``checks.py`` excepted).

``backbone`` is the one door to CLIP weights, ``text`` makes text features out of prompts, ``synthetic`` makes
class-conditional images out of class names, ``selection`` holds the min-max loss and the selection rule,
``results`` writes and reads ``results.json``, ``checkpoints`` does so with checkpoints, ``inert`` reads files of others
without executing them, ``checks`` says what config values can be, ``runs`` keeps a run folder to one process and ends
training on a signal, ``trainer`` is what every Dassl trainer of ours shares.
"""
