import torchvision.transforms as T

from ...utils import check_availability

# The order given in INPUT.TRANSFORMS has no effect, nor has center_crop: every test transform crops.
AVAI_CHOICES = ["random_crop", "random_resized_crop", "center_crop", "random_flip", "colorjitter", "randomgrayscale"]
AVAI_CHOICES += ["gaussian_blur", "normalize"]
INTERPOLATION_MODES = {mode.value: mode for mode in map(T.InterpolationMode, ("bilinear", "bicubic", "nearest"))}


def build_transform(cfg, is_train=True, choices=None):
    """Build the transform from a PIL image to a (3, H, W) tensor; ``choices`` replaces INPUT.TRANSFORMS."""
    node = cfg.INPUT
    if node.NO_TRANSFORM:
        print("Note: no transform is applied!")
        return None
    choices = node.TRANSFORMS if choices is None else choices
    for choice in choices:
        check_availability(choice, AVAI_CHOICES)
    size, mode, augment = node.SIZE, INTERPOLATION_MODES[node.INTERPOLATION], {*choices} if is_train else set()
    steps = []

    def add(applies, message, transform, *args, **kwargs) -> None:
        if applies:
            print(f"+ {message}")
            steps.append(transform(*args, **kwargs))

    print(f"Building transform_{'train' if is_train else 'test'}")
    height, width, padding, scale, blur = *size, node.CROP_PADDING, node.RRCROP_SCALE, node.GB_K
    b, c, s, h = node.COLORJITTER_B, node.COLORJITTER_C, node.COLORJITTER_S, node.COLORJITTER_H
    whole = is_train and not augment & {"random_crop", "random_resized_crop"}
    add(not is_train, f"resize the smaller edge to {max(size)}", T.Resize, max(size), mode)
    add(not is_train, f"{height}x{width} center crop", T.CenterCrop, size)
    add(whole, f"resize to {height}x{width}", T.Resize, size, mode)
    add("random_crop" in augment, f"random crop (padding = {padding})", T.RandomCrop, size, padding=padding)
    message = f"random resized crop (size={size}, scale={scale})"
    add("random_resized_crop" in augment, message, T.RandomResizedCrop, size, scale=scale, interpolation=mode)
    add("random_flip" in augment, "random flip", T.RandomHorizontalFlip)
    message = f"color jitter (brightness={b}, contrast={c}, saturation={s}, hue={h})"
    add("colorjitter" in augment, message, T.ColorJitter, b, c, s, h)
    add("randomgrayscale" in augment, "random gray scale", T.RandomGrayscale, node.RGS_P)
    if "gaussian_blur" in augment:  # an even kernel is refused only where it is used
        add(True, f"gaussian blur (kernel={blur})", T.RandomApply, [T.GaussianBlur(blur)], p=node.GB_P)
    add(True, "to torch tensor of range [0, 1]", T.ToTensor)
    message = f"normalization (mean={node.PIXEL_MEAN}, std={node.PIXEL_STD})"
    add("normalize" in choices, message, T.Normalize, node.PIXEL_MEAN, node.PIXEL_STD)
    return T.Compose(steps)
