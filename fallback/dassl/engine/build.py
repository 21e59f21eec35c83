from ..utils import Registry

TRAINER_REGISTRY = Registry("TRAINER")


def build_trainer(cfg):
    return TRAINER_REGISTRY.build(cfg.TRAINER.NAME, cfg)
