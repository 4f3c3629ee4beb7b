"""A trained image-text model as a Hugging Face folder.

    python -m jax_cl_bd.export --workdir=RUN --to=FOLDER --format=huggingface

RUN is a run folder (the victim), RUN/control or RUN/defenses/<name>. FOLDER gets config.json,
model.safetensors, preprocessor_config.json and tokenizer.json; `load_encoder` opens it again. The
format holds CLIP with a vision transformer, and SigLIP as published; configs/clip_scenes.py trains
both with tower=vit. A tokenizer trained by us adds no start and end token by itself when another
library reads its tokenizer.json: put <start> before and <end> behind the ids.
"""

from etils import epath

from jax_cl_bd import parallel, run_folder
from jax_cl_bd.errors import UserError
from jax_cl_bd.models import encoder, hub_clip
from jax_cl_bd.objectives import training

GROUPS = ("model", "text", "objective", "data")


def export(workdir: epath.Path, to: epath.Path) -> str:
    """Writes the model of `workdir` to a new folder.

    Returns:
        Its kind, "clip" or "siglip".
    Raises:
        UserError: no trained model there, one that the format cannot hold, or `to` is not empty.
    """
    cfg = training.plain(run_folder.read_config(workdir))
    if cfg.text.name == "none":
        raise UserError(f"{workdir} holds an image encoder alone, and --format=huggingface is for "
                        "CLIP and SigLIP; jax_cl_bd.models.hub.save_resnet writes a ResNet")
    check_new(to)
    opened = encoder.load(workdir, parallel.one_device())
    hub_clip.save(to, {group: cfg[group].to_dict() for group in GROUPS}, opened.pair.variables)
    opened.pair.tokenizer.save(to / "tokenizer.json")
    return cfg.objective.name


def check_new(to: epath.Path) -> None:
    """Refuses a folder that holds something."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to={to} exists and is not empty; name a new folder")
