"""The tokenizer: lossless in three languages, trained on the training split alone."""

import json
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gramjax.data import tokenizer
from gramjax.data.emoji import assets

RECORDS = assets.load_records()
TOKENIZER = tokenizer.load_tokenizer()


def folded(text):
    return unicodedata.normalize("NFC", text).lower()


def test_special_tokens():
    for number, token in enumerate(tokenizer.SPECIAL_TOKENS):
        assert TOKENIZER.token_to_id(token) == number
    assert (tokenizer.PAD, tokenizer.CLS, tokenizer.SEP, tokenizer.MASK) == (0, 1, 2, 3)
    assert TOKENIZER.get_vocab_size() == 2048
    assert TOKENIZER.encode("cat").ids[0] == tokenizer.CLS
    assert TOKENIZER.encode("cat").ids[-1] == tokenizer.SEP


@pytest.mark.parametrize("language", tokenizer.LANGUAGES)
def test_every_text_comes_back(language):
    texts = [text for record in RECORDS for text in (record[language]["name"], *record[language]["keywords"])]
    encodings = TOKENIZER.encode_batch(texts)
    for text, encoding in zip(texts, encodings, strict=True):
        assert TOKENIZER.decode(encoding.ids) == folded(text)
    # Words are not spelt letter by letter (a Chinese character is three bytes, and the space before a word one).
    bytes_a_token = sum(len(text.encode()) for text in texts) / sum(len(encoding.ids) - 2 for encoding in encodings)
    assert bytes_a_token > (1.8 if language == "chinese" else 2.5)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="["), max_size=40))
def test_any_text_comes_back(text):
    decoded = TOKENIZER.decode(TOKENIZER.encode(text).ids)
    normalizer = TOKENIZER.normalizer
    assert normalizer is not None
    assert decoded.strip(" ") == normalizer.normalize_str(text).strip(" ")


@pytest.mark.parametrize("language", tokenizer.LANGUAGES)
def test_tokens_of_a_text_are_those_of_its_words(language):
    for record in RECORDS[::7]:
        words = " ".join(record[language]["keywords"]).split()
        one_by_one = [i for word in words for i in TOKENIZER.encode(word, add_special_tokens=False).ids]
        assert TOKENIZER.encode(" ".join(words), add_special_tokens=False).ids == one_by_one


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
