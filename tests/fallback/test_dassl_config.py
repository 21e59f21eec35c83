from dassl.config import clean_cfg, get_cfg_default
from yacs.config import CfgNode


def test_each_call_returns_a_copy_of_the_defaults():
    get_cfg_default().INPUT.PIXEL_MEAN.append(1.0)
    get_cfg_default().DATALOADER.TRAIN_X.BATCH_SIZE = 1
    cfg = get_cfg_default()
    assert cfg.INPUT.PIXEL_MEAN == [0.485, 0.456, 0.406] and cfg.DATALOADER.TRAIN_X.BATCH_SIZE == 32
    assert (cfg.OPTIM.NAME, cfg.OPTIM.LR, cfg.OPTIM.WEIGHT_DECAY, cfg.OPTIM.STEPSIZE) == ("adam", 3e-4, 5e-4, (-1,))
    assert (cfg.TEST.FINAL_MODEL, cfg.TRAIN.PRINT_FREQ, cfg.DATASET.NUM_SHOTS, cfg.SEED) == ("last_step", 10, -1, -1)


def test_merges_a_coop_style_file_and_an_old_dump(tmp_path):
    path = tmp_path / "vit.yaml"
    path.write_text(
        "DATALOADER:\n  TRAIN_X:\n    BATCH_SIZE: 4\n"
        'INPUT:\n  SIZE: (32, 32)\n  TRANSFORMS: ["random_flip", "normalize"]\n  GN_STD: 0.2\n  RANDAUGMENT_N: 3\n'
    )
    cfg = get_cfg_default()
    cfg.merge_from_file(str(path))
    cfg.merge_from_list(["OPTIM.MAX_EPOCH", "50"])
    cfg.freeze()
    assert (cfg.DATALOADER.TRAIN_X.BATCH_SIZE, cfg.INPUT.SIZE, cfg.OPTIM.MAX_EPOCH) == (4, (32, 32), 50)
    assert tuple(cfg.INPUT.TRANSFORMS) == ("random_flip", "normalize")
    path.write_text(cfg.dump())
    again = get_cfg_default()
    again.merge_from_file(str(path))
    assert again == cfg


def test_clean_cfg_removes_the_other_trainers():
    cfg = get_cfg_default()
    cfg.TRAINER.COOP, cfg.TRAINER.COCOOP = CfgNode({"N_CTX": 16}), CfgNode({"N_CTX": 4})
    clean_cfg(cfg, "CoOp")
    assert set(cfg.TRAINER) == {"NAME", "COOP"}
