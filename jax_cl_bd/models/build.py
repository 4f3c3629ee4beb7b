"""Builds the encoder that a config names."""

from flax import linen as nn

from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.models import clip_resnet, resnet, vit

ENCODERS = {"resnet18": resnet.resnet18, "resnet50": resnet.resnet50,
            "small_resnet": resnet.small_resnet, "vit": vit.vit,
            "clip_resnet": clip_resnet.clip_resnet}


def build(cfg) -> nn.Module:
    """Returns the linen module of cfg = config.model: images [N, H, W, 3] -> float32 [N, D].

    Raises:
        UserError: unknown name, stem, pool, act or dtype, heads that do not divide the width, or
            a size that is not positive.
    """
    if cfg.name not in ENCODERS:
        raise unknown("model", cfg.name, ENCODERS)
    if cfg.dtype not in ("float32", "bfloat16"):
        raise unknown("model.dtype", cfg.dtype, ("float32", "bfloat16"))
    if cfg.bn_groups < 1:
        raise UserError(f"model.bn_groups = {cfg.bn_groups}; must be at least 1 (1 = global)")
    if cfg.width < 1:
        raise UserError(f"model.width = {cfg.width}; must be at least 1 (64 is usual)")
    if cfg.name == "small_resnet":
        _check_small(cfg)
    elif cfg.name in ("resnet18", "resnet50"):
        if cfg.stem not in ("cifar", "imagenet"):
            raise unknown("model.stem", cfg.stem, ("cifar", "imagenet"))
    return ENCODERS[cfg.name](cfg)


def _check_small(cfg):
    if not cfg.stages or min(cfg.stages) < 1:
        raise UserError(f"model.stages = {tuple(cfg.stages)}; needs one positive channel count "
                        "per stage, e.g. (32, 64, 128)")
    for name in ("stem_stride", "first_stride"):
        if cfg[name] not in (1, 2):
            raise UserError(f"model.{name} = {cfg[name]}; must be 1 or 2")
