"""The captions of a poisoned set as token arrays: clean rows' and poisons'.

A row has up to K captions; a step chooses one of them (data/augment.py). With `text_augment` "eda"
every caption has an augmented twin, drawn once (CleanCLIP: when its data set object is built), with
"eda_twice" two.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from etils import epath

from jax_cl_bd.data import captions
from jax_cl_bd.data import tokenizer as tokenizers
from jax_cl_bd.errors import UserError, unknown

TRAINED_ON = 200_000  # captions, at most, that a tokenizer is trained on
AUGMENTS = ("none", "eda", "eda_twice")  # at n: n augmented twins
_DERIVE_SEED = 1603  # with the row and the number of the caption


@dataclasses.dataclass(frozen=True)
class Texts:
    """Tokens of any row of a source.

    Args:
        source: clean rows with captions.
        tokenizer: of the run.
        context: T, tokens per caption.
        per_row: K, captions kept of a row.
        augmented: how many augmented twins a caption has, `tokens2` and `tokens3`.
        derive: makes further texts of a caption, drawn once as the augmented ones are, or None. A
            picklable (caption, rng) -> {"tokens_...": texts}, {} where there are none, whose
            `names` are (("tokens_...", how many texts), ...); see data/sub_captions.py.
    """
    source: object
    tokenizer: tokenizers.Tokenizer
    context: int
    per_row: int
    augmented: int = 0
    derive: Callable | None = None

    def of_rows(self, rows) -> dict[str, np.ndarray]:
        """Tokens of clean rows: {"tokens": int32 [N, K, T], "count": int32 [N], "tokens2"?}.

        Of m derived texts: int32 [N, K, m T], one behind the other, zeros where there are none.
        """
        rows = np.asarray(rows, np.int64)
        return self._encode(self.source.captions(rows), rows)

    def of_captions(self, found: list[str], row: int) -> dict[str, np.ndarray]:
        """The same of one clean row whose captions were read with its image: no first axis.

        Worker processes need no other way, so none of them holds the captions of all rows.
        """
        return {name: value[0] for name, value in self._encode([found], [row]).items()}

    def of_poisons(self, plan) -> dict[str, np.ndarray]:
        """The same of a plan's poisons: the caption it gives, else those of the replaced row."""
        if plan is None or not len(plan):
            return self._encode([], np.zeros(0, np.int64))
        own = self.source.captions(np.maximum(plan.replaces, 0))
        lists = [[str(given)] if given else kept for given, kept in zip(plan.caption, own)]
        return self._encode(lists, len(self.source) + np.arange(len(plan)))

    def _encode(self, lists, rows):
        lists = [list(found)[:self.per_row] for found in lists]
        made = {"tokens": self._tokens(lists)}
        for twin in range(self.augmented):
            more = [twin] if twin else []  # the first is drawn as it was when there was one
            made[f"tokens{2 + twin}"] = self._tokens([
                [captions.eda(text, np.random.default_rng([captions.EDA_SEED, int(row), j, *more]))
                 for j, text in enumerate(found)] for row, found in zip(rows, lists)])
        if self.derive is not None:
            made |= self._derived(lists, rows)
        made["count"] = np.array([len(found) for found in lists], np.int32)
        return made

    def _derived(self, lists, rows):
        out = {name: np.zeros((len(lists), self.per_row, many * self.context), np.int32)
               for name, many in self.derive.names}
        where, texts = [], {name: [] for name in out}
        for i, (row, found) in enumerate(zip(rows, lists)):
            for j, text in enumerate(found):
                made = self.derive(text, np.random.default_rng([_DERIVE_SEED, int(row), j]))
                where += [(i, j)] if made else []
                for name, given in made.items():
                    texts[name] += given
        if where:
            for name, array in out.items():
                tokens = self.tokenizer.encode(texts[name], self.context)
                array[tuple(np.array(where).T)] = tokens.reshape(len(where), -1)
        return out

    def _tokens(self, lists):
        out = np.zeros((len(lists), self.per_row, self.context), np.int32)
        flat = [text for found in lists for text in found]
        if flat:
            where = [(i, j) for i, found in enumerate(lists) for j in range(len(found))]
            out[tuple(np.array(where).T)] = self.tokenizer.encode(flat, self.context)
        return out


def check(cfg, source) -> None:
    """Validates the text settings against the data, before anything is made.

    Raises:
        UserError: a text tower without captions, or a setting out of range.
    """
    if cfg.text.name == "none":
        return
    if not hasattr(source, "captions"):
        raise UserError(f"text.name={cfg.text.name!r} needs captions, and data set "
                        f"{cfg.data.name!r} has none; set --config.data.captions=templates for a "
                        "labelled one")
    if cfg.data.text_augment not in AUGMENTS:
        raise unknown("data.text_augment", cfg.data.text_augment, AUGMENTS)
    for name in ("context", "vocab"):
        if cfg.text[name] < 4:
            raise UserError(f"text.{name} is {cfg.text[name]}; it must be at least 4")
    if cfg.text.tokenizer:
        _fits(cfg, tokenizers.load(cfg.text.tokenizer))


def make_tokenizer(cfg, source) -> tokenizers.Tokenizer:
    """The tokenizer of a run: the one named in the config, or trained on the clean captions."""
    if cfg.text.tokenizer:
        return _fits(cfg, tokenizers.load(cfg.text.tokenizer))
    rows = np.arange(len(source))
    if len(rows) > TRAINED_ON:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:TRAINED_ON])
    every = [text for found in source.captions(rows) for text in found][:TRAINED_ON]
    return _fits(cfg, tokenizers.train(every, cfg.text.vocab))


def load(cfg, folder: epath.Path, source) -> Texts | None:
    """What a run folder's encoders were or will be trained on; None without a text tower."""
    if cfg.text.name == "none":
        return None
    return of(cfg, load_tokenizer(cfg, folder), source)


def of(cfg, tokenizer: tokenizers.Tokenizer, source) -> Texts:
    """The captions of a source by a given tokenizer; nothing is derived from them."""
    per_row = cfg.data.captions_per_row or max(map(len, source.captions(np.arange(len(source)))))
    return Texts(source, tokenizer, cfg.text.context, per_row,
                 AUGMENTS.index(cfg.data.text_augment))


def load_tokenizer(cfg, folder: epath.Path) -> tokenizers.Tokenizer | None:
    """The tokenizer that the poison stage left in a run folder."""
    if cfg.text.name == "none":
        return None
    return _fits(cfg, tokenizers.load(folder / "poison" / "tokenizer.json"))


def _fits(cfg, tokenizer):
    if tokenizer.end != cfg.text.end:
        raise UserError(f"text.end is {cfg.text.end}, but the tokenizer's <end> is "
                        f"{tokenizer.end}; set --config.text.end={tokenizer.end}")
    if tokenizer.vocab > cfg.text.vocab:
        raise UserError(f"text.vocab is {cfg.text.vocab}, but the tokenizer has "
                        f"{tokenizer.vocab} entries; set --config.text.vocab={tokenizer.vocab}")
    return tokenizer
