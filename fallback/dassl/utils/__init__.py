# ruff: noqa: F401, I001
from .tools import AverageMeter, Logger, MetricMeter, Registry, check_availability, check_isfile, collect_env_info
from .tools import listdir_nohidden, mkdir_if_missing, read_image, read_json, set_random_seed, setup_logger, write_json
from .torchtools import count_num_param, load_checkpoint, load_pretrained_weights, resume_from_checkpoint
from .torchtools import save_checkpoint
