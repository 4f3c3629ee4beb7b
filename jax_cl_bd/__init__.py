"""Backdoors in contrastive learning: poison, pretrain, measure, defend, report."""

__version__ = "0.1.0"


def load_encoder(path):
    """Opens the encoder of a run folder, of a defense's folder or of a hub folder.

    Args:
        path: a run folder, `defenses/<name>` inside one, or a folder with model.safetensors.

    Returns:
        `jax_cl_bd.models.encoder.Encoder`; its `image(uint8 [N, S, S, 3])` gives float32 [N, D],
        S its `image_size`. Of an image-text model `text(captions)` gives unit vectors; of others
        `text` is None.

    Raises:
        UserError: the folder holds no encoder.
    """
    from jax_cl_bd.models.encoder import load

    return load(path)
