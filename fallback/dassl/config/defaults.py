"""The default value of every configuration key, as a plain nested dictionary."""

from __future__ import annotations

_INPUT = {
    "SIZE": (224, 224),  # height, width in pixels
    "INTERPOLATION": "bilinear",  # a key of dassl.data.transforms.INTERPOLATION_MODES
    "TRANSFORMS": (),  # names from dassl.data.transforms.AVAI_CHOICES
    "NO_TRANSFORM": False,  # True: images are handed out as PIL images
    "PIXEL_MEAN": [0.485, 0.456, 0.406],  # ImageNet, RGB, of values in [0, 1]
    "PIXEL_STD": [0.229, 0.224, 0.225],
    "CROP_PADDING": 4,  # random_crop: pixels added on every side
    "RRCROP_SCALE": (0.08, 1.0),  # random_resized_crop: range of the kept share of the area
    "CUTOUT_N": 1,  # cutout: number of squares
    "CUTOUT_LEN": 16,  # cutout: their side in pixels
    "GN_MEAN": 0.0,  # gaussian_noise, added to the normalised tensor
    "GN_STD": 0.15,
    "RANDAUGMENT_N": 2,  # read by Dassl's randaugment family, which is not part of the fallback
    "RANDAUGMENT_M": 10,
    "COLORJITTER_B": 0.4,  # brightness
    "COLORJITTER_C": 0.4,  # contrast
    "COLORJITTER_S": 0.4,  # saturation
    "COLORJITTER_H": 0.1,  # hue
    "RGS_P": 0.2,  # randomgrayscale: probability
    "GB_P": 0.5,  # gaussian_blur: probability
    "GB_K": 21,  # gaussian_blur: kernel side, odd
}

_DATASET = {
    "ROOT": "",  # folder that holds all data sets
    "NAME": "",  # a name in DATASET_REGISTRY
    "SOURCE_DOMAINS": (),
    "TARGET_DOMAINS": (),
    "NUM_LABELED": -1,  # labelled images in total (semi-supervised data sets)
    "NUM_SHOTS": -1,  # training images of each class; below 1: all
    "VAL_PERCENT": 0.1,  # share of the training images used for validation (semi-supervised data sets)
    "STL10_FOLD": -1,
    "CIFAR_C_TYPE": "",
    "CIFAR_C_LEVEL": 1,
    "ALL_AS_UNLABELED": False,
}

_DATALOADER = {
    "NUM_WORKERS": 4,
    "K_TRANSFORMS": 1,  # augmented versions of each training image
    "RETURN_IMG0": False,  # also hand out the image without augmentation, as "img0"
    "TRAIN_X": {
        "SAMPLER": "RandomSampler",
        "BATCH_SIZE": 32,
        "N_DOMAIN": 0,  # RandomDomainSampler: domains in a batch; below 1: all
        "N_INS": 16,  # RandomClassSampler: images of each class in a batch
    },
    "TRAIN_U": {
        "SAME_AS_X": True,  # ignore the four values below and use those of TRAIN_X
        "SAMPLER": "RandomSampler",
        "BATCH_SIZE": 32,
        "N_DOMAIN": 0,
        "N_INS": 16,
    },
    "TEST": {"SAMPLER": "SequentialSampler", "BATCH_SIZE": 32},
}

_MODEL = {
    "INIT_WEIGHTS": "",  # file with weights to start from
    "BACKBONE": {"NAME": "", "PRETRAINED": True},
    "HEAD": {"NAME": "", "HIDDEN_LAYERS": (), "ACTIVATION": "relu", "BN": True, "DROPOUT": 0.0},
}

_OPTIM = {
    "NAME": "adam",
    "LR": 0.0003,
    "WEIGHT_DECAY": 5e-4,
    "MOMENTUM": 0.9,  # sgd, rmsprop
    "SGD_DAMPNING": 0,
    "SGD_NESTEROV": False,
    "RMSPROP_ALPHA": 0.99,
    "ADAM_BETA1": 0.9,  # adam, amsgrad, adamw, radam
    "ADAM_BETA2": 0.999,
    "STAGED_LR": False,  # True: children of the model outside NEW_LAYERS learn at LR * BASE_LR_MULT
    "NEW_LAYERS": (),
    "BASE_LR_MULT": 0.1,
    "LR_SCHEDULER": "single_step",  # single_step, multi_step or cosine
    "STEPSIZE": (-1,),  # epochs; single_step uses the last one, and MAX_EPOCH when that is below 1
    "GAMMA": 0.1,
    "MAX_EPOCH": 10,
    "WARMUP_EPOCH": -1,  # below 1: no warm-up
    "WARMUP_TYPE": "linear",  # linear or constant
    "WARMUP_CONS_LR": 1e-5,
    "WARMUP_MIN_LR": 1e-5,
    "WARMUP_RECOUNT": True,  # True: the schedule starts at epoch 0 after the warm-up; False: at WARMUP_EPOCH
}

_TRAIN = {
    "CHECKPOINT_FREQ": 0,  # epochs between checkpoints; below 1: only after the last epoch
    "PRINT_FREQ": 10,  # batches between log lines
    "COUNT_ITER": "train_x",  # what an epoch is counted by where labelled and unlabelled images are mixed
}

_TEST = {
    "EVALUATOR": "Classification",
    "PER_CLASS_RESULT": False,
    "COMPUTE_CMAT": False,  # True: write the confusion matrix to OUTPUT_DIR/cmat.pt
    "NO_TEST": False,
    "SPLIT": "test",  # split of the final evaluation: test or val
    "FINAL_MODEL": "last_step",  # or best_val, which evaluates on val (test where there is none) after every epoch
}

DEFAULTS = {
    "VERSION": 1,
    "OUTPUT_DIR": "./output",
    "RESUME": "",  # folder of an earlier run to go on from; empty: OUTPUT_DIR
    "SEED": -1,  # negative: not fixed
    "USE_CUDA": True,
    "VERBOSE": True,
    "INPUT": _INPUT,
    "DATASET": _DATASET,
    "DATALOADER": _DATALOADER,
    "MODEL": _MODEL,
    "OPTIM": _OPTIM,
    "TRAIN": _TRAIN,
    "TEST": _TEST,
    "TRAINER": {"NAME": ""},
}
