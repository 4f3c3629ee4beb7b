"""Sentences that a class name is put into, for captions and for zero-shot prompts."""

from jax_cl_bd.errors import UserError

# The 80 prompts of CLIP's ImageNet evaluation (Radford et al. 2021, section 3.1.4; openai/CLIP,
# notebooks/Prompt_Engineering_for_ImageNet.ipynb), in their order. The grammar ("a origami") is
# theirs. CleanCLIP and its followers fill poisoned captions from the same list.
PROMPTS = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

# Our own, in no caption that the program makes: whether a backdoor or a class is bound to the
# wording of the poisons (papers: "evaluate with held-out templates").
HELD_OUT = (
    "here we see a {}.",
    "an image showing one {}.",
    "there is a {} in this picture.",
    "a snapshot of some {}.",
    "this is what a {} looks like.",
    "somebody photographed the {}.",
    "the picture contains a {}.",
    "look at this {}!",
    "an illustration with a {}.",
    "a scene in which a {} appears.",
)


def fill(template: str, name: str) -> str:
    """Puts a class name, or a longer phrase, into a template; underscores become blanks."""
    return template.replace("{}", name.replace("_", " "))


def per_row(setting: int) -> int:
    """How many prompts a row's captions use: data.captions_per_row, 0 for all of them.

    Raises:
        UserError: a number of captions that the prompts do not give.
    """
    if not 0 <= setting <= len(PROMPTS):
        raise UserError(f"data.captions_per_row is {setting}; it must be 0 (every prompt) to "
                        f"{len(PROMPTS)}")
    return setting or len(PROMPTS)
