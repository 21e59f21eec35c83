"""The default of every configuration key. Keys that nothing here reads remain, so that config files of Dassl load."""

from yacs.config import CfgNode

# fmt: off
_LOADER = {"SAMPLER": "RandomSampler", "BATCH_SIZE": 32, "N_DOMAIN": 0, "N_INS": 16}
_INPUT = {
    "SIZE": (224, 224), "INTERPOLATION": "bilinear", "TRANSFORMS": (), "NO_TRANSFORM": False,  # SIZE: height, width
    "PIXEL_MEAN": [0.485, 0.456, 0.406], "PIXEL_STD": [0.229, 0.224, 0.225],  # ImageNet, RGB, of values in [0, 1]
    "CROP_PADDING": 4, "RRCROP_SCALE": (0.08, 1.0),  # random_crop, random_resized_crop (range of the area)
    "COLORJITTER_B": 0.4, "COLORJITTER_C": 0.4, "COLORJITTER_S": 0.4, "COLORJITTER_H": 0.1,
    "RGS_P": 0.2, "GB_P": 0.5, "GB_K": 21,  # randomgrayscale; gaussian_blur: probability, kernel size (odd)
    "GN_MEAN": 0.0, "GN_STD": 0.15, "RANDAUGMENT_N": 2, "RANDAUGMENT_M": 10, "CUTOUT_N": 1, "CUTOUT_LEN": 16,  # unused
}
_DATASET = {
    "ROOT": "", "NAME": "", "SOURCE_DOMAINS": (), "TARGET_DOMAINS": (), "NUM_SHOTS": -1,  # shots below 1: all images
    "NUM_LABELED": -1, "VAL_PERCENT": 0.1, "ALL_AS_UNLABELED": False, "STL10_FOLD": -1,
    "CIFAR_C_TYPE": "", "CIFAR_C_LEVEL": 1,
}
_OPTIM = {
    "NAME": "adam", "LR": 0.0003, "WEIGHT_DECAY": 5e-4, "ADAM_BETA1": 0.9, "ADAM_BETA2": 0.999,
    "MOMENTUM": 0.9, "SGD_DAMPNING": 0, "SGD_NESTEROV": False, "RMSPROP_ALPHA": 0.99,
    "STAGED_LR": False, "NEW_LAYERS": (), "BASE_LR_MULT": 0.1,  # STAGED_LR True is refused
    "LR_SCHEDULER": "single_step", "GAMMA": 0.1, "MAX_EPOCH": 10, "STEPSIZE": (-1,),  # below 1: MAX_EPOCH
    "WARMUP_EPOCH": -1, "WARMUP_TYPE": "linear", "WARMUP_CONS_LR": 1e-5, "WARMUP_MIN_LR": 1e-5,
    "WARMUP_RECOUNT": True,  # after the warm-up the schedule starts at epoch 0; False: at WARMUP_EPOCH
}
DEFAULTS = {
    "VERSION": 1, "OUTPUT_DIR": "./output", "VERBOSE": True, "USE_CUDA": True, "TRAINER": {"NAME": ""},
    "RESUME": "", "SEED": -1,  # run folder to resume from (empty: OUTPUT_DIR); a negative seed is not set
    "INPUT": _INPUT, "DATASET": _DATASET, "OPTIM": _OPTIM,
    "DATALOADER": {
        "NUM_WORKERS": 4, "K_TRANSFORMS": 1, "RETURN_IMG0": False,  # several versions of an image are refused
        "TRAIN_X": _LOADER, "TRAIN_U": {"SAME_AS_X": True, **_LOADER},
        "TEST": {"SAMPLER": "SequentialSampler", "BATCH_SIZE": 32},
    },
    "MODEL": {
        "INIT_WEIGHTS": "", "BACKBONE": {"NAME": "", "PRETRAINED": True},
        "HEAD": {"NAME": "", "HIDDEN_LAYERS": (), "ACTIVATION": "relu", "BN": True, "DROPOUT": 0.0},
    },
    "TRAIN": {"CHECKPOINT_FREQ": 0, "PRINT_FREQ": 10, "COUNT_ITER": "train_x"},  # in epochs (below 1: last), batches
    "TEST": {
        "EVALUATOR": "Classification", "PER_CLASS_RESULT": False, "COMPUTE_CMAT": False, "NO_TEST": False,
        "SPLIT": "test", "FINAL_MODEL": "last_step",  # or val; or best_val, which evaluates after every epoch
    },
}
# fmt: on


def get_cfg_default() -> CfgNode:
    """Return a new, unfrozen configuration."""
    return CfgNode(DEFAULTS)
