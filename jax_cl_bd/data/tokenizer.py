"""Captions to token ids, through the `tokenizers` library.

Either a byte-level BPE trained on the run's captions (ids: 0 <pad>, 1 <end>, 2 <start>; no unknown
token is needed, for every byte has one), or any tokenizer.json, such as CLIP's.
"""

from collections.abc import Iterable

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jax_cl_bd.errors import UserError

PAD, START, END = "<pad>", "<start>", "<end>"  # of a tokenizer that is trained here
SMALLEST = 3 + 256  # the special tokens and the bytes
# (start, end, pad) of the vocabularies that are known. CLIP's code fills up with
# zeros, though its json names <|endoftext|> as the padding; SigLIP has no start token and fills up
# with its </s>; the last is SigLIP 2.
_KNOWN = ((START, END, PAD), ("<|startoftext|>", "<|endoftext|>", None),
          (None, "</s>", "</s>"), (None, "<eos>", "<pad>"))


class Tokenizer:
    """One vocabulary.

    vocab: rows that an embedding table needs. start, end, pad: ids; start is None if it has none.
    """

    def __init__(self, content: str):
        """Builds it from the text of a tokenizer.json.

        Raises:
            UserError: the text is no tokenizer, or it names none of the known end tokens.
        """
        try:
            self._inner = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"not a tokenizer.json: {str(error).splitlines()[0]}") from error
        self._inner.no_padding()
        self._inner.no_truncation()
        self._inner.encode_special_tokens = True  # "<end>" in a caption is text, not the end
        has = self._inner.get_vocab(with_added_tokens=True)
        known = [names for names in _KNOWN if all(n in has for n in names if n is not None)]
        if not known:
            raise UserError("the tokenizer.json has none of the end tokens that are known here: "
                            + ", ".join(end for _, end, _ in _KNOWN))
        start, end, pad = known[0]
        self.start, self.end, self.pad = has.get(start), has[end], has.get(pad, 0)
        self.vocab = max(has.values()) + 1

    def encode(self, captions: list[str], context: int) -> np.ndarray:
        """Turns captions into int32 [N, context]: <start> tokens <end> padding.

        A caption that is too long is cut and <end> stands at the last place (CleanCLIP's processor
        loses it there).

        Raises:
            UserError: a context too short for the special tokens.
        """
        first = [] if self.start is None else [self.start]
        room = context - len(first) - 1
        if room < 0:
            raise UserError(f"text.context is {context}; it must hold at least <start> and <end>")
        out = np.full((len(captions), context), self.pad, np.int32)
        encodings = self._inner.encode_batch(list(captions), add_special_tokens=False)
        for row, encoding in zip(out, encodings):
            ids = first + encoding.ids[:room] + [self.end]
            row[:len(ids)] = ids
        return out

    def decode(self, tokens: np.ndarray) -> str:
        """The text of one row of `encode`, without its special tokens."""
        skip = {self.start, self.end, self.pad}
        return self._inner.decode([int(t) for t in tokens if int(t) not in skip]).strip()

    def save(self, path) -> None:
        """Writes a tokenizer.json."""
        epath.Path(path).write_text(self.to_json())

    def to_json(self) -> str:
        """The text of the tokenizer.json."""
        return self._inner.to_str(pretty=False)

    def __reduce__(self):
        return Tokenizer, (self.to_json(),)


def train(captions: Iterable[str], vocab: int) -> Tokenizer:
    """Learns a byte-level BPE of at most `vocab` entries; the text is lower-cased.

    The order of the captions does not matter.

    Raises:
        UserError: no captions, or a vocabulary too small for the bytes.
    """
    if vocab < SMALLEST:
        raise UserError(f"text.vocab is {vocab}; a tokenizer trained on the run's captions needs "
                        f"at least {SMALLEST}")
    texts = list(captions)
    if not texts:
        raise UserError("there are no captions to train a tokenizer on; set data.captions or "
                        "text.tokenizer")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[PAD, END, START], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return Tokenizer(inner.to_str())


def load(path: epath.PathLike) -> Tokenizer:
    """Reads a tokenizer.json, or the one in a folder (a hub folder).

    Raises:
        UserError: there is no such file, or it is no tokenizer.
    """
    path = epath.Path(path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        content = path.read_text()
    except FileNotFoundError as error:
        raise UserError(f"text.tokenizer {str(path)!r} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"text.tokenizer {str(path)!r} cannot be read: {error}") from error
    try:
        return Tokenizer(content)
    except UserError as error:
        raise UserError(f"text.tokenizer {str(path)!r}: {error}") from error
