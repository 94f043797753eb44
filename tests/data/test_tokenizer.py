"""The tokenizer: words of the training split, and letters to spell names with."""

import json
import re
import unicodedata
from collections import Counter

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gramjax.data import tokenizer
from gramjax.data.emoji import assets

RECORDS = assets.load_records()
TOKENIZER = tokenizer.load_tokenizer()
VOCABULARY = TOKENIZER.get_vocab()


def tokens(ids):
    return [TOKENIZER.id_to_token(i) for i in ids]


def words_of(record):
    """Written again by hand: what a space, comma, colon, bracket or quotation mark parts; Chinese characters alone."""
    texts = [
        text for language in tokenizer.LANGUAGES for text in (record[language]["name"], *record[language]["keywords"])
    ]
    normal = [unicodedata.normalize("NFC", text).lower() for text in texts]
    parts = [part for text in normal for part in re.split(r"[\s,:;，、：；\"“”«»()]", text) if part]
    han = re.compile("([㐀-鿿豈-﫿\U00020000-\U0003ffff々〇])")
    return {piece for part in parts for piece in han.split(part) if piece}


def test_special_tokens():
    for number, token in enumerate(tokenizer.SPECIAL_TOKENS):
        assert TOKENIZER.token_to_id(token) == number
    assert (tokenizer.PAD, tokenizer.CLS, tokenizer.UNK) == (0, 1, 2)
    assert sorted(VOCABULARY.values()) == list(range(len(VOCABULARY)))


def test_the_vocabulary_is_the_words_of_two_training_pictographs():
    pictographs = Counter(word for record in RECORDS if record["split"] == "train" for word in words_of(record))
    expected = {word for word, count in pictographs.items() if count >= 2}
    found = {word for word in VOCABULARY if not word.startswith(tokenizer.LETTER)} - set(tokenizer.SPECIAL_TOKENS)
    assert found == expected
    assert {"cat", "gato", "猫"} <= found


def test_other_words_are_unknown_and_left_out():
    assert TOKENIZER.encode("Smiling CAT, xyzzy").tokens == ["[CLS]", "smiling", "cat", "[UNK]"]
    assert tokens(tokenizer.known_words("xyzzy: cat (xyzzy) 笑脸")) == ["cat", "笑", "脸"]
    assert tokenizer.known_words("xyzzy") == ()


@settings(max_examples=100, deadline=None)
@given(st.text("abcxyzñéü -'", max_size=40))
def test_letters_spell_the_text(text):
    spelt = "".join(token.removeprefix(tokenizer.LETTER) for token in tokens(tokenizer.letters(text)))
    assert spelt == unicodedata.normalize("NFC", text).replace("'", "")


def test_names_are_words_each_followed_by_its_letters():
    assert tokens(tokenizer.spelt_words("Cat xq")) == ["cat", "##c", "##a", "##t", "## ", "##x", "##q", "## "]
    one_by_one = [token for word in ("grinning", "yak") for token in tokenizer.spelt_words(word)]
    assert list(tokenizer.spelt_words("grinning  yak")) == one_by_one


@pytest.mark.parametrize("language", tokenizer.LANGUAGES)
def test_every_name_has_a_token(language):
    for record in RECORDS:
        assert tokenizer.spelt_words(record[language]["name"]), record[language]["name"]


def test_training_sees_only_the_training_split():
    altered = [
        record
        if record["split"] == "train"
        else record | {name: {"name": "zyzzyva", "keywords": ["zyzzyva"]} for name in tokenizer.LANGUAGES}
        for record in RECORDS
    ]
    trained = tokenizer.train_tokenizer(altered)
    assert json.loads(trained.to_str()) == json.loads(tokenizer.PATH.read_text(encoding="utf-8"))
    assert isinstance(trained, tokenizers.Tokenizer)
