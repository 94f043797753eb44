"""The text tokenizer of the emoji set: words of three languages, and letters to spell names with.

A token is a word (in Chinese a character) met with at least two training pictographs: a thousand pictographs are too
few to learn from the pieces of words what a picture shows. But how a word sounds is in its letters, and half of the
English names of unseen pictographs hold no word known from training. So the name, which is what is spoken, is also
spelt.
"""

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

PAD, CLS, UNK = 0, 1, 2
SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[UNK]")
LANGUAGES = ("english", "spanish", "chinese")
ALPHABETIC = ("english", "spanish")
MIN_PICTOGRAPHS = 2
# Of the letters' entries in the vocabulary, to tell the letter from the word "a".
LETTER = "##"
PATH = Path(__file__).parent / "emoji" / "assets" / "tokenizer.json"


@functools.cache
def load_tokenizer() -> "tokenizers.Tokenizer":
    """The committed tokenizer; `[PAD]` is 0, `[CLS]` 1, `[UNK]` 2.

    `encode` puts `[CLS]` before a text unless `add_special_tokens=False`. Case is folded; spaces, commas, colons and
    quotation marks separate words.

    >>> tokenizer = load_tokenizer()
    >>> tokenizer.encode("Grinning cat, catamaran").tokens
    ['[CLS]', 'grinning', 'cat', '[UNK]']
    """
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(PATH))


def known_words(text: str) -> tuple[int, ...]:
    """Token ids of the words of a text that the tokenizer knows; others are left out.

    >>> len(known_words("grinning catamaran"))
    1
    """
    ids = load_tokenizer().encode(text, add_special_tokens=False).ids
    return tuple(i for i in ids if i != UNK)


def letters(text: str) -> tuple[int, ...]:
    """Token ids of the letters of a text, spaces included; characters never met are left out.

    >>> [load_tokenizer().id_to_token(i) for i in letters("A cat")]
    ['##a', '## ', '##c', '##a', '##t']
    """
    tokenizer = load_tokenizer()
    assert tokenizer.normalizer is not None
    ids = [tokenizer.token_to_id(LETTER + letter) for letter in tokenizer.normalizer.normalize_str(text)]
    return tuple(i for i in ids if i is not None)


def spelt_words(text: str) -> tuple[int, ...]:
    """Token ids of a name: each word, if known, and then its letters.

    >>> [load_tokenizer().id_to_token(i) for i in spelt_words("red yak")]
    ['red', '##r', '##e', '##d', '## ', '##y', '##a', '##k', '## ']
    """
    return tuple(token for word in text.split() for token in (*known_words(word), *letters(word + " ")))


def train_tokenizer(records: Iterable[Mapping[str, Any]]) -> "tokenizers.Tokenizer":
    """Collects words and letters of the names and keywords of the records whose `split` is "train".

    The result depends on the records alone.
    """
    import tokenizers
    from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers

    normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s,:;，、：；\"“”«»()]+"), "removed"),
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
        ]
    )
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", CLS)])

    pictographs, alphabet = [], set()
    for record in records:
        if record["split"] == "train":
            texts = {
                language: normalizer.normalize_str(" ".join((record[language]["name"], *record[language]["keywords"])))
                for language in LANGUAGES
            }
            # Each word once, so that the trainer counts pictographs.
            words = {word for text in texts.values() for word, _ in splitter.pre_tokenize_str(text)}
            pictographs.append(" ".join(sorted(words)))
            alphabet.update(*(texts[language] for language in ALPHABETIC))
    trainer = trainers.WordLevelTrainer(
        vocab_size=2**20, min_frequency=MIN_PICTOGRAPHS, special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )
    tokenizer.train_from_iterator(pictographs, trainer)
    vocabulary = tokenizer.get_vocab()
    spelling = {LETTER + letter: number for number, letter in enumerate(sorted(alphabet), len(vocabulary))}
    tokenizer.model = models.WordLevel(vocabulary | spelling, unk_token="[UNK]")
    return tokenizer
