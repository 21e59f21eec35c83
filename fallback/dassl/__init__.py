"""The part of Dassl.pytorch that prompt-learning code uses: same modules, names, config keys, defaults and log lines.

Not included: backbones, bundled data sets, samplers by class or domain, random_translation, cutout, RandAugment and the
trainers for domain adaptation.
"""

__version__ = "0.6.3+fallback"
