"""Byte-pair encoding: text to token ids and back, trained here or read from CLIP's published files.

Paper: section 7 says that captions are byte-pair encoded, App. C how many tokens are read, neither how large the vocabulary is; CLIP and GLIDE
encode bytes (after Sennrich et al. 2016).
Differences: our own vocabulary keeps case and spaces, so that any string comes back exactly; CLIP's (`Tokenizer.from_clip`)
lower-cases, cleans and marks the end of words. One algorithm serves both, because a token is but a number here::

              padding   end       single bytes                         merges         start, end
    own       0         1         2 .. 257                             258 ..
    CLIP      0         (last)    0 .. 255, at a word's end 256 .. 511  512 ..         the last two
"""

import gzip
import html
import json
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Pair = tuple[int, int]
Style = Literal["own", "clip"]

FORMAT = "minunclip-tokenizer-1"
CLIP_MERGES = 49_152 - 256 - 2  # CLIP's file lists more merges than CLIP uses
START, END = "<|startoftext|>", "<|endoftext|>"  # CLIP's names of them
CACHED_WORDS = 100_000
# Merges never cross a word: a word has its leading space; digits, punctuation and other white space stand apart.
# Every character falls into one of the alternatives, so the words of a text, joined, are the text.
WORD = re.compile(r" ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


class Tokenizer:
    """Reversible byte-level BPE: decode(encode(text)) == text for every string (CLIP's style: up to its cleaning)."""

    def __init__(self, merges: Sequence[Pair], style: Style = "own"):
        """`merges`: the pairs of token ids that become one token, the most frequent first; the table above numbers them."""
        first = 258 if style == "own" else 512
        if style == "own":
            self.padding, self.end_token, self.start_token = 0, 1, None
            self.pieces = [b"", b"", *(bytes([byte]) for byte in range(256))]  # the bytes that a token stands for
            self._first_byte, self._last_byte = list(range(2, 258)), list(range(2, 258))
        else:
            order = list(_clip_alphabet().values())
            self.padding, self.end_token, self.start_token = 0, first + len(merges) + 1, first + len(merges)
            self.pieces = [bytes([byte]) for byte in order] + [bytes([byte]) + b" " for byte in order]  # a word's end reads as a space
            self._first_byte = [order.index(byte) for byte in range(256)]
            self._last_byte = [256 + token for token in self._first_byte]
        smallest = first - 256 if style == "own" else 0
        for pair in merges:
            if not all(smallest <= token < len(self.pieces) for token in pair):
                raise ValueError(f"merge {len(self.pieces) - first} joins {pair}, but only tokens {smallest} .. {len(self.pieces) - 1} exist by then")
            self.pieces.append(self.pieces[pair[0]] + self.pieces[pair[1]])
        if style == "clip":
            self.pieces += [b"", b""]
        self.style: Style = style
        self.merges = {pair: first + rank for rank, pair in enumerate(merges)}
        if len(self.merges) != len(merges):
            raise ValueError("the same merge is listed twice: the vocabulary is damaged")
        self._cache: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.pieces)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int) -> "Tokenizer":
        """Join the most frequent pair of neighbouring tokens until there are `vocabulary_size` tokens, or nothing to join.

        Of equally frequent pairs the lowest token ids win, so the result is the same on every machine and in every order of texts.
        """
        if vocabulary_size < 258:
            raise ValueError(f"vocabulary_size {vocabulary_size} is too small: padding, end and the 256 bytes are 258 tokens already")
        count_of = Counter(word for text in texts for word in WORD.findall(text))
        words = [[2 + byte for byte in word.encode("utf-8", "surrogatepass")] for word in count_of]
        counts = list(count_of.values())
        frequency: Counter[Pair] = Counter()
        found_in: dict[Pair, set[int]] = defaultdict(set)  # so that a merge visits only the words it changes
        for i, word in enumerate(words):
            for pair in pairwise(word):
                frequency[pair] += counts[i]
                found_in[pair].add(i)

        merges: list[Pair] = []
        while len(merges) < vocabulary_size - 258 and frequency:
            best = min(frequency, key=lambda pair: (-frequency[pair], pair))
            for i in found_in[best].copy():
                for pair in pairwise(words[i]):
                    frequency[pair] -= counts[i]
                    found_in[pair].discard(i)
                words[i] = _merge(words[i], best, 258 + len(merges))
                for pair in pairwise(words[i]):
                    frequency[pair] += counts[i]
                    found_in[pair].add(i)
            frequency = +frequency  # drops the pairs that are gone
            merges.append(best)
        return cls(merges)

    def encode(self, text: str) -> list[int]:
        """Text to token ids, without start, end or limit."""
        words = WORD.findall(text) if self.style == "own" else _clip_word().findall(_clip_clean(text))
        return list(chain.from_iterable(self._cache.get(word) or self._encode_word(word) for word in words))

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids to text, up to the end token if there is one. Bytes that are no text (a model's, never encode's) become U+FFFD."""
        pieces = []
        for token in map(int, ids):
            if token == self.end_token:
                break
            if not 0 <= token < len(self):
                raise ValueError(f"token {token} is not in this vocabulary of {len(self)}: were the ids made with another tokenizer?")
            pieces.append(self.pieces[token])
        joined = b"".join(pieces)
        try:
            text = joined.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            text = joined.decode("utf-8", "replace")
        return text if self.style == "own" else text.strip()

    def length(self, text: str) -> int:
        """Tokens that the whole caption takes, the end token included: more than context_length means that it will be cut."""
        return len(self.encode(text)) + (1 if self.start_token is None else 2)

    def __call__(self, texts: Sequence[str], context_length: int) -> tuple[Tensor, Tensor]:
        """Captions to ids (B, context_length) int64 and mask (B, context_length) bool, True on the text and its end token.

        A text that is too long is cut, and still ends with the end token (see `length`). An empty one is the end token alone.
        """
        if isinstance(texts, str):
            raise ValueError("expected a list of texts, got one string: write [text]")
        start = [] if self.start_token is None else [self.start_token]
        room = context_length - len(start) - 1
        if room < 0:
            raise ValueError(f"context_length {context_length} has no room for the end token: use at least {len(start) + 1}")
        rows = [start + self.encode(text)[:room] + [self.end_token] for text in texts]
        mask = torch.arange(context_length) < torch.tensor([len(row) for row in rows], dtype=torch.int64)[:, None]
        ids = torch.full(mask.shape, self.padding, dtype=torch.int64)
        ids[mask] = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
        return ids, mask

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, all of it or nothing."""
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        unfinished.write_text(json.dumps({"format": FORMAT, "style": self.style, "merges": list(self.merges)}), encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read what `save` wrote. ValueError if the file is anything else, FileNotFoundError if it is not there."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a tokenizer: it is not JSON ({error})") from None
        if not isinstance(content, dict) or content.keys() != {"format", "style", "merges"}:
            raise ValueError(f"{path} is not a tokenizer: it must have format, style and merges, and nothing else")
        if content["format"] != FORMAT or content["style"] not in ("own", "clip"):
            raise ValueError(f"{path} has format {content['format']!r} and style {content['style']!r}: this version reads {FORMAT}, 'own' or 'clip'")
        merges = content["merges"]
        if not isinstance(merges, list) or not all(isinstance(pair, list) and [type(token) for token in pair] == [int, int] for pair in merges):
            raise ValueError(f"{path} is not a tokenizer: merges must be a list of pairs of token ids")
        try:
            return cls([(left, right) for left, right in merges], content["style"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_clip(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """CLIP's own vocabulary, from its file of merges (`merges.txt`, or `bpe_simple_vocab_16e6.txt.gz`), or from a folder of Hugging Face's.

        The ids follow from the merges; the vocabulary in the folder is checked against them. With the published file,
        "a photo of a cat" is 320 1125 539 320 2368, between 49406 and 49407. Text that spells <|endoftext|> is plain text here.
        """
        folder, path = Path(path), Path(path)
        vocabulary = None
        if path.is_dir():
            files = [path / name for name in ("merges.txt", "tokenizer.json") if (path / name).is_file()]
            path = files[0] if files else path / "merges.txt"
            if (folder / "vocab.json").is_file():
                vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        raw = path.read_bytes()
        if path.suffix == ".json":
            model = json.loads(raw).get("model", {})
            if not {"merges", "vocab"} <= model.keys():
                raise ValueError(f"{path} has no merges and vocabulary of byte-pair encoding: it belongs to another tokenizer than CLIP's")
            lines, vocabulary = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]], model["vocab"]
        else:
            lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8").splitlines()
        names = _clip_bytes()
        id_of = {name: token for token, name in enumerate(names)}
        merges: list[Pair] = []
        for number, line in enumerate(lines, 1):
            if not line or (number == 1 and "#version" in line):
                continue
            if len(merges) == CLIP_MERGES:
                break
            parts = line.split(" ")
            if len(parts) != 2 or parts[0] not in id_of or parts[1] not in id_of:
                raise ValueError(f"{path}, line {number}: {line!r} is not a merge of two earlier tokens: is this CLIP's file of merges?")
            id_of["".join(parts)], pair = len(names) + len(merges), (id_of[parts[0]], id_of[parts[1]])
            merges.append(pair)
        tokenizer = cls(merges, "clip")
        if vocabulary is not None and vocabulary != id_of | {START: len(tokenizer) - 2, END: len(tokenizer) - 1}:
            raise ValueError(f"{folder} numbers its tokens otherwise than CLIP does: this loader reads CLIP's vocabulary only")
        return tokenizer

    def clip_files(self) -> tuple[dict[str, int], list[tuple[str, str]]]:
        """The vocabulary and the merges as CLIP's files spell them: the inverse of `from_clip`. ValueError for a vocabulary of our own."""
        if self.style != "clip":
            raise ValueError("this vocabulary is not CLIP's: other libraries cannot read it")
        names, merges = _clip_bytes(), []
        for left, right in self.merges:
            merges.append((names[left], names[right]))
            names.append(names[left] + names[right])
        return {name: token for token, name in enumerate([*names, START, END])}, merges

    def _encode_word(self, word: str) -> list[int]:
        data = word.encode("utf-8", "surrogatepass")
        tokens = [self._first_byte[byte] for byte in data[:-1]] + [self._last_byte[data[-1]]]
        never = len(self)
        while len(tokens) > 1:
            best = min(pairwise(tokens), key=lambda pair: self.merges.get(pair, never))  # the earliest merge first, as in training
            if best not in self.merges:
                break
            tokens = _merge(tokens, best, self.merges[best])
        if len(self._cache) < CACHED_WORDS:
            self._cache[word] = tokens
        return tokens


def _merge(tokens: list[int], pair: Pair, merged: int) -> list[int]:
    """Replace every occurrence of the pair, from the left."""
    result: list[int] = []
    i = 0
    while i < len(tokens):
        if i + 1 < len(tokens) and (tokens[i], tokens[i + 1]) == pair:
            result.append(merged)
            i += 2
        else:
            result.append(tokens[i])
            i += 1
    return result


def _clip_alphabet() -> dict[str, int]:
    """The printable letter for each byte, in the order in which GPT-2 and CLIP number them: their files are text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _clip_bytes() -> list[str]:
    """The names of CLIP's first 512 tokens."""
    return [*_clip_alphabet(), *(letter + "</w>" for letter in _clip_alphabet())]


def _clip_clean(text: str) -> str:
    """CLIP's cleaning, without the repair of wrongly decoded text: NFC, HTML entities, single spaces, lower case."""
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", text)))
    return " ".join(text.split()).lower()


@lru_cache
def _clip_word() -> re.Pattern[str]:
    """CLIP's words: contractions, runs of letters, single numerals, runs of anything else that is no space."""
    # Python's \d lacks the numerals that are no decimal digits, such as ½ and Ⅷ, and its \w takes them for letters
    numerals = "".join(letter for letter in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(letter) in ("Nl", "No"))
    return re.compile(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{numerals}]+|[\d{numerals}]|(?:[^\s\w]|_)+")
