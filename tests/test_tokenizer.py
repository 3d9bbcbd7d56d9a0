"""The tokenizer: reversible on any string, trained as the definition says, and equal to the Rust library where both apply."""

import gzip
import json
import pickle
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from minunclip.data.tokenizer import WORD, Tokenizer

TEXTS = [
    "a small red star left of a large blue circle",
    "Two striped purple stars on a green background",
    "a photo of a cat; it isn't a CAT_photo, it's 12 cats!",
    "  naïve café — ¿qué tal?  日本語 😀😀 😀",
]
TOKENIZER = Tokenizer.train(TEXTS * 3, 330)
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))  # control characters and lone surrogates included
CLEAN_TEXT = st.text(
    st.one_of(
        st.sampled_from("abcaeiost ABC '’12½Ⅷ_!?.,-éßñ\t\n日本😀"),
        st.characters(codec="utf-8", categories=("Lu", "Ll", "Nd", "Po", "Sc"), max_codepoint=0x24F),
    )
)


def letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte, written out again."""
    visible = [byte for byte in range(256) if 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def rust_oracle(tokenizer: Tokenizer) -> RustTokenizer:
    """The Rust library's byte-level BPE with our merges and our numbers."""
    names = ["<pad>", "<end>"] + ["".join(letters()[byte] for byte in piece) for piece in tokenizer.pieces[2:]]
    rust = RustTokenizer(BPE({name: i for i, name in enumerate(names)}, [(names[a], names[b]) for a, b in tokenizer.merges]))
    split = Regex(r" ?\p{L}+| ?\p{Nd}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return rust


AB = Tokenizer.train(["abab aabb abba babab aaab aaaa bbbb abaab"], 275)
RUST_AB = rust_oracle(AB)


@given(ANY_TEXT)
def test_any_string_comes_back_exactly(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(ANY_TEXT)
def test_words_joined_are_the_text(text: str) -> None:
    assert "".join(WORD.findall(text)) == text


@pytest.mark.parametrize("text", ["", " ", "  a  b ", "Cat cAT", "\0\x1b\r\n\t", "👩‍👩‍👧 é", "\ud800", "<|endoftext|>", "_ __ a_b", "½ Ⅷ ²"])
def test_awkward_strings_come_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_encoding_equals_the_rust_library() -> None:
    rust = rust_oracle(TOKENIZER)
    for text in [*TEXTS, "a starry blue cat", "photophotophoto", "aaaaaaa", "  two   stars \n", "unseen ψ words"]:
        assert TOKENIZER.encode(text) == rust.encode(text).ids, text


@settings(max_examples=200)
@given(st.text(st.sampled_from("ab "), max_size=30))
def test_overlapping_merges_equal_the_rust_library(text: str) -> None:
    assert AB.encode(text) == RUST_AB.encode(text).ids


@settings(max_examples=30)
@given(st.lists(st.text(st.sampled_from("abc "), max_size=12), max_size=5))
def test_training_joins_the_most_frequent_pair_each_time(texts: list[str]) -> None:
    """Against the definition: count all pairs afresh for every merge."""
    words = [[2 + byte for byte in word.encode()] for text in texts for word in WORD.findall(text)]
    expected: list[tuple[int, int]] = []
    while len(expected) < 8:
        frequency = Counter(pair for word in words for pair in pairwise(word))
        if not frequency:
            break
        most = max(frequency.values())
        best = min(pair for pair in frequency if frequency[pair] == most)
        expected.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [257 + len(expected)]
                i += 1
    assert list(Tokenizer.train(texts, 266).merges) == expected


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    assert Tokenizer.train(reversed(TEXTS * 3), 330).merges == TOKENIZER.merges


def test_merges_never_cross_a_word() -> None:
    assert all(b" " not in piece[1:] for piece in TOKENIZER.pieces if piece.strip())


def test_vocabulary_has_the_size_asked_for_or_ends_when_nothing_is_left() -> None:
    assert len(TOKENIZER) == 330
    assert len(Tokenizer.train(["ab"], 300)) == 259


def test_batch_ends_each_text_and_masks_padding() -> None:
    ids, mask = TOKENIZER(["", "a star", "a small red star left of a star"], 5)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape == (3, 5)
    assert ids[0].tolist() == [TOKENIZER.end_token] + [TOKENIZER.padding] * 4
    for row, seen, text in zip(ids, mask, ["", "a star", "a small red star left of a star"], strict=True):
        expected = TOKENIZER.encode(text)[:4] + [TOKENIZER.end_token]
        assert row[seen].tolist() == expected
        assert seen.tolist() == [i < len(expected) for i in range(5)]
    assert TOKENIZER.decode(ids[1]) == "a star"


@given(ANY_TEXT)
def test_length_tells_that_a_caption_is_cut(text: str) -> None:
    context = 6
    ids, mask = TOKENIZER([text], context)
    whole = [*TOKENIZER.encode(text), TOKENIZER.end_token]
    assert (TOKENIZER.length(text) <= context) == (ids[mask].tolist() == whole)


def test_no_texts_give_an_empty_batch() -> None:
    ids, mask = TOKENIZER([], 5)
    assert ids.shape == mask.shape == (0, 5)


def test_broken_utf8_decodes_to_the_replacement_character() -> None:
    assert TOKENIZER.decode([2 + 0xFF, 2 + ord("a")]) == "\ufffda"


def test_saving_and_loading_and_pickling_keep_everything(tmp_path) -> None:
    TOKENIZER.save(tmp_path / "vocabulary.json")
    assert [path.name for path in tmp_path.iterdir()] == ["vocabulary.json"]
    for copy in (Tokenizer.load(tmp_path / "vocabulary.json"), pickle.loads(pickle.dumps(TOKENIZER))):
        assert copy.pieces == TOKENIZER.pieces and copy.merges == TOKENIZER.merges and copy.end_token == TOKENIZER.end_token
        assert copy.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "vocabulary.json"
    TOKENIZER.save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        AB.save(path)
    assert path.read_bytes() == before


GOOD = {"format": "minunclip-tokenizer-1", "style": "own", "merges": [[99, 100]]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "nothing else"),
        (json.dumps(GOOD | {"extra": 1}), "nothing else"),
        (json.dumps(GOOD | {"format": "other"}), "this version reads"),
        (json.dumps(GOOD | {"style": "words"}), "this version reads"),
        (json.dumps(GOOD | {"merges": [[99, "b"]]}), "pairs of token ids"),
        (json.dumps(GOOD | {"merges": [[99, 100, 101]]}), "pairs of token ids"),
        (json.dumps(GOOD | {"merges": [[99, 258]]}), "only tokens 2 .. 257 exist"),
        (json.dumps(GOOD | {"merges": [[0, 99]]}), "only tokens 2 .. 257 exist"),
        (json.dumps(GOOD | {"merges": [[99, 100], [99, 100]]}), "listed twice"),
    ],
)
def test_loading_is_strict(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value) and "vocabulary.json" in str(caught.value)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="vocabulary_size 257 is too small"):
        Tokenizer.train([], 257)
    with pytest.raises(ValueError, match="list of texts"):
        TOKENIZER("a star", 8)
    with pytest.raises(ValueError, match="context_length 0"):
        TOKENIZER(["a star"], 0)
    with pytest.raises(ValueError, match="token 330 is not in this vocabulary"):
        TOKENIZER.decode([330])


# CLIP's format, with a vocabulary made by hand

CLIP_LINES = ["p h", "o t", "ph ot", "phot o</w>", "o f</w>", "c a", "ca t</w>", "a t</w>", "' s</w>", "Ã ©</w>", "! !</w>", "ot o</w>"]


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(CLIP_LINES) + "\n", encoding="utf-8")
    names = [*letters().values()]
    names += [letter + "</w>" for letter in names]
    names += [line.replace(" ", "") for line in CLIP_LINES] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")

    rust = RustTokenizer(BPE(vocabulary, [tuple(line.split()) for line in CLIP_LINES], end_of_word_suffix="</w>", continuing_subword_prefix=""))
    rust.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    split = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    rust.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return folder, Tokenizer.from_clip(folder), rust


def test_clip_layout_is_that_of_the_published_vocabulary(clip_files) -> None:
    _, tokenizer, _ = clip_files
    assert tokenizer.encode("a") == [320]  # the published number of "a</w>", which no merge enters
    assert tokenizer.encode("!") == [256]
    assert (tokenizer.start_token, tokenizer.end_token) == (len(tokenizer) - 2, len(tokenizer) - 1)
    ids, mask = tokenizer(["a  Photo of a CAT", ""], 7)
    assert ids.tolist() == [[524, 320, 515, 516, 320, 518, 525], [524, 525, 0, 0, 0, 0, 0]]
    assert mask.sum(dim=1).tolist() == [7, 2]
    assert tokenizer.length("a photo of a cat") == 7
    assert tokenizer.decode(ids[0]) == "a photo of a cat"


@given(text=CLEAN_TEXT)
def test_clip_encoding_equals_the_rust_library(clip_files, text: str) -> None:
    _, tokenizer, rust = clip_files
    assert tokenizer.encode(text) == rust.encode(text, add_special_tokens=False).ids


def test_clip_cleans_html_and_keeps_special_names_as_text(clip_files) -> None:
    _, tokenizer, _ = clip_files
    assert tokenizer.decode(tokenizer.encode("Cat &amp;amp;\n photo")) == "cat & photo"
    assert tokenizer.end_token not in tokenizer.encode("<|endoftext|>")


def test_clip_vocabulary_saves_and_loads_as_ours(clip_files, tmp_path) -> None:
    folder, tokenizer, _ = clip_files
    tokenizer.save(tmp_path / "clip.json")
    copy = Tokenizer.load(tmp_path / "clip.json")
    assert copy.pieces == tokenizer.pieces and copy.encode("café photo!!") == tokenizer.encode("café photo!!")
    assert Tokenizer.from_clip(folder / "merges.txt").merges == tokenizer.merges


def test_clip_reads_a_compressed_file_and_leaves_surplus_merges(clip_files, tmp_path, monkeypatch) -> None:
    folder, tokenizer, _ = clip_files
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress(b'"bpe_simple_vocab_16e6.txt#version: 0.2\n' + "\n".join(CLIP_LINES).encode()))
    assert Tokenizer.from_clip(path).merges == tokenizer.merges
    monkeypatch.setattr("minunclip.data.tokenizer.CLIP_MERGES", 3)
    assert len(Tokenizer.from_clip(path)) == 512 + 3 + 2


def test_clip_is_read_from_the_rust_librarys_file_and_spelt_out_again(clip_files, tmp_path) -> None:
    folder, tokenizer, rust = clip_files
    rust.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_clip(tmp_path).merges == tokenizer.merges
    assert tokenizer.clip_files() == (json.loads((folder / "vocab.json").read_text()), [tuple(line.split()) for line in CLIP_LINES])
    with pytest.raises(ValueError, match="not CLIP's"):
        TOKENIZER.clip_files()
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(ValueError, match="no merges and vocabulary"):
        Tokenizer.from_clip(tmp_path)


def test_wrong_clip_files_are_refused(tmp_path) -> None:
    path = tmp_path / "merges.txt"
    path.write_text("#version: 0.2\np h\nxx y\n")
    with pytest.raises(ValueError, match="line 3: 'xx y'"):
        Tokenizer.from_clip(path)
    path.write_text("p h\n")
    (tmp_path / "vocab.json").write_text('{"p": 0}')
    with pytest.raises(ValueError, match="numbers its tokens otherwise"):
        Tokenizer.from_clip(tmp_path)
