"""The text towers of CLIP and SigLIP: token ids to features.

Radford et al. 2021, section 2.4 (causal, pooled at the end token); Zhai et al. 2023 (SigLIP: not
causal, pooled at the last position). First values of OpenAI's release: token embedding N(0, .02),
positional embedding N(0, .01).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from jax_cl_bd.errors import UserError, unknown
from jax_cl_bd.models import transformer


class TextTransformer(nn.Module):
    """Token ids int32 [N, T] to features float32 [N, width], before any projection.

    The feature is the final norm's output at one position: the first that holds `end` (pool
    "end"; position 0 if none does), the first that holds the text's highest id (pool "highest":
    OpenAI's code, equal to "end" where `end` is the highest id) or the last (pool "last"), or
    `length` - 1 if a length is given. An id outside the vocabulary gives NaN.

    `embeddings` [N, T, width], where given, stand in for the table's rows of the tokens, so that
    one can differentiate by them; the tokens then only say where a text ends.

    Attributes:
        context: the most tokens T of a text.
        end: id of the token that ends every text.
        causal: a position sees only those before it, and itself.
        dtype: of the computation; parameters and features stay float32.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    context: int
    end: int
    causal: bool
    pool: str
    mlp_ratio: float
    act: str
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array, train: bool, length: jax.Array | None = None,
                 embeddings: jax.Array | None = None) -> jax.Array:
        # tokens: [N, T]; length: [N]; embeddings: [N, T, width]
        if tokens.shape[1] > self.context:
            raise UserError(f"texts of {tokens.shape[1]} tokens, but text.context = "
                            f"{self.context}; cut them or raise it")
        normal = nn.initializers.normal
        table = self.param("token_embedding", normal(0.02), (self.vocab, self.width), jnp.float32)
        places = self.param("position_embedding", normal(0.01), (self.context, self.width),
                            jnp.float32)
        # take, not table[tokens]: that would clamp an id of another vocabulary without a word.
        x = jnp.take(table, tokens, axis=0) if embeddings is None else embeddings
        x = x + places[:tokens.shape[1]]
        x = transformer.blocks(x.astype(self.dtype), self, causal=self.causal)
        if length is not None:
            at = length - 1
        elif self.pool == "end":
            at = (tokens == self.end).argmax(1)
        elif self.pool == "highest":
            at = tokens.argmax(1)
        else:
            at = jnp.full(len(tokens), tokens.shape[1] - 1)
        x = jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]
        return transformer.layer_norm(self.eps, self.dtype, "ln_final")(x).astype(jnp.float32)


def build(cfg) -> TextTransformer:
    """Returns the text tower of cfg = config.text.

    Raises:
        UserError: no text tower, an unknown pool or act, heads that do not divide the width, an
            end token outside the vocabulary, or a size that is not positive.
    """
    if cfg.name == "none":
        raise UserError("an image-text objective needs a text tower; set text.name = transformer")
    if cfg.name != "transformer":
        raise unknown("text", cfg.name, ("none", "transformer"))
    transformer.check(cfg, "text")
    if cfg.pool not in ("end", "highest", "last"):
        raise unknown("text.pool", cfg.pool, ("end", "highest", "last"))
    if cfg.context < 2:
        raise UserError(f"text.context = {cfg.context}; needs room for a start and an end token")
    if not 0 <= cfg.end < cfg.vocab:
        raise UserError(f"text.end = {cfg.end} is no id of a vocabulary of text.vocab = "
                        f"{cfg.vocab}")
    return TextTransformer(
        vocab=cfg.vocab, width=cfg.width, layers=cfg.layers, heads=cfg.heads, context=cfg.context,
        end=cfg.end, causal=cfg.causal, pool=cfg.pool, mlp_ratio=cfg.mlp_ratio, act=cfg.act,
        eps=cfg.eps, dtype=jnp.dtype(cfg.dtype))
