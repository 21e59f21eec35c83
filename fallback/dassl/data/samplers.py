from torch.utils.data import RandomSampler, Sampler, SequentialSampler


def build_sampler(sampler_type: str, cfg=None, data_source=None, batch_size=32, n_domain=0, n_ins=16) -> Sampler:
    """Build the sampler named; the other arguments are for Dassl's samplers, which are not included."""
    samplers = {"RandomSampler": RandomSampler, "SequentialSampler": SequentialSampler}
    if sampler_type not in samplers:
        raise ValueError(f"unknown sampler {sampler_type}: choose one of {', '.join(samplers)}")
    return samplers[sampler_type](data_source)
