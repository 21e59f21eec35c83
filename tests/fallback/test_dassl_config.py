import dassl
from dassl.config import clean_cfg, get_cfg_default
from yacs.config import CfgNode


def test_version():
    assert dassl.__version__.startswith("0.6.3")


def test_known_defaults():
    cfg = get_cfg_default()
    assert (cfg.OPTIM.NAME, cfg.OPTIM.LR, cfg.OPTIM.WEIGHT_DECAY, cfg.OPTIM.STEPSIZE) == ("adam", 3e-4, 5e-4, (-1,))
    assert (cfg.INPUT.SIZE, cfg.INPUT.INTERPOLATION, cfg.INPUT.RRCROP_SCALE) == ((224, 224), "bilinear", (0.08, 1.0))
    assert (cfg.DATALOADER.TRAIN_X.BATCH_SIZE, cfg.DATALOADER.TEST.SAMPLER) == (32, "SequentialSampler")
    assert (cfg.TEST.FINAL_MODEL, cfg.TRAIN.PRINT_FREQ, cfg.DATASET.NUM_SHOTS, cfg.SEED) == ("last_step", 10, -1, -1)
    assert (cfg.OUTPUT_DIR, cfg.VERSION, cfg.MODEL.HEAD.ACTIVATION) == ("./output", 1, "relu")


def test_each_call_gives_its_own_copy():
    first = get_cfg_default()
    first.INPUT.PIXEL_MEAN.append(1.0)
    first.OPTIM.LR = 1.0
    assert get_cfg_default().INPUT.PIXEL_MEAN == [0.485, 0.456, 0.406]
    assert get_cfg_default().OPTIM.LR == 3e-4


def test_merges_a_coop_style_file(tmp_path):
    path = tmp_path / "vit.yaml"
    path.write_text(
        "DATALOADER:\n  TRAIN_X:\n    BATCH_SIZE: 4\n"
        'INPUT:\n  SIZE: (32, 32)\n  TRANSFORMS: ["random_flip", "normalize"]\n'
        'OPTIM:\n  LR: 0.002\n  WARMUP_TYPE: "constant"\n'
    )
    cfg = get_cfg_default()
    cfg.merge_from_file(str(path))
    cfg.merge_from_list(["OPTIM.MAX_EPOCH", "50"])
    cfg.freeze()
    assert (cfg.DATALOADER.TRAIN_X.BATCH_SIZE, cfg.INPUT.SIZE, cfg.OPTIM.MAX_EPOCH) == (4, (32, 32), 50)
    assert tuple(cfg.INPUT.TRANSFORMS) == ("random_flip", "normalize")


def test_clean_cfg_keeps_the_chosen_trainer():
    cfg = get_cfg_default()
    cfg.TRAINER.COOP = CfgNode({"N_CTX": 16})
    cfg.TRAINER.COCOOP = CfgNode({"N_CTX": 4})
    clean_cfg(cfg, "CoOp")
    assert set(cfg.TRAINER) == {"NAME", "COOP"}
