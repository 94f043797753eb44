"""The text tokenizer of the emoji set: byte-level BPE, trained on the training split's words in three languages.

Byte level means that no text is out of vocabulary: whatever is not among the learned pieces is spelt in UTF-8 bytes.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

PAD, CLS, SEP, MASK = 0, 1, 2, 3
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
LANGUAGES = ("english", "spanish", "chinese")
VOCABULARY_SIZE = 2048
PATH = Path(__file__).parent / "emoji" / "assets" / "tokenizer.json"


@functools.cache
def load_tokenizer() -> "tokenizers.Tokenizer":
    """The committed tokenizer; `[PAD]` is 0, `[CLS]` 1, `[SEP]` 2, `[MASK]` 3.

    `encode` wraps a text as `[CLS] ... [SEP]` unless `add_special_tokens=False`. Case is folded: names are not told
    apart by it.

    >>> tokenizer = load_tokenizer()
    >>> encoding = tokenizer.encode("grinning cat")
    >>> encoding.ids[0], encoding.ids[-1]
    (1, 2)
    >>> tokenizer.decode(encoding.ids)
    'grinning cat'
    """
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(PATH))


def train_tokenizer(records: Iterable[Mapping[str, Any]]) -> "tokenizers.Tokenizer":
    """Trains the byte-level BPE on the names and keywords of the records whose `split` is "train".

    The result depends on the records alone (tokenizers' trainer is deterministic).
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    # The space before the first word is the pre-tokenizer's own: strip it again when decoding.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [
        text
        for record in records
        if record["split"] == "train"
        for language in LANGUAGES
        for text in (record[language]["name"], *record[language]["keywords"])
    ]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return tokenizer
