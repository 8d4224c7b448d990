"""The text encoder and tokenizer of Stable Diffusion 1.5: those of CLIP ViT-L/14.

A prompt becomes c, the states that condition teacher and student alike. Both stay frozen.

Modules carry the names of the official single-file checkpoint less its prefix: its keys *are* the
state dict, and recent folders have the same names.

Shapes: B batch, L tokens (77 as the tokenizer pads them), D width of a token, A heads.
"""

import functools
import gzip
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from pathlib import Path
from unicodedata import normalize

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

KEY_PREFIX = "cond_stage_model.transformer."    # of its keys in an official single file
INNER_PREFIX = "text_model."                    # after that one, in most files but not in all

# ------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a CLIP text encoder; the defaults are Stable Diffusion 1.5's."""

    vocab_size: int = 49408
    positions: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"heads is {self.heads}: it must divide {self.width}")


class Embeddings(nn.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position_embedding.weight[: ids.shape[1]]            # (L, D)
        return self.token_embedding(ids) + positions                          # (B, L, D)


class Attention(nn.Module):
    """Causal multi-head self-attention: a token sees itself and those before it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)           # (B, A, L, D/A)
        return self.out_proj(x.transpose(1, 2).flatten(2))                    # (B, L, D)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)               # (B, A, L, D/A)


class MLP(nn.Module):
    """Two linear layers around CLIP's quick GELU, x · sigmoid(1.702 x).

    Not PyTorch's GELU: OpenAI trained this CLIP with the approximation.
    """

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)                                                       # (B, L, 4 D)
        return self.fc2(x * torch.sigmoid(1.702 * x))                         # (B, L, D)


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class TextEncoder(nn.Module):
    """The frozen text encoder of Stable Diffusion 1.5: 123,060,480 parameters at the defaults.

    Padding is not masked: the UNet was trained with the states of all 77 positions, padding too.
    """

    def __init__(self, config: TextConfig = TextConfig()):
        super().__init__()
        self.config = config
        layers = (Layer(config.width, config.heads) for _ in range(config.layers))
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.final_layer_norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L), int64, to the states of the last layer, normalised (B, L, D).

        L is at most `config.positions`.
        """
        x = self.embeddings(ids)                                              # (B, L, D)
        for layer in self.encoder["layers"]:
            x = layer(x)                                                      # (B, L, D)
        return self.final_layer_norm(x)                                       # (B, L, D)


# ------------------------------------------------------------------------------- the tokenizer

LENGTH = 77  # tokens of every prompt, with START and END
START, END = 49406, 49407  # the last two ids of the vocabulary
SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}  # also when a text spells them so
_MISSING = "the tokenizer needs the package that holds its vocabulary: pip install open_clip_torch"


class Tokenizer:
    """CLIP's byte-level BPE, with the vocabulary file inside open_clip_torch.

    Text is composed (NFC) and lower-cased, then cut into runs of letters, single digits, runs of
    punctuation and English contractions; whitespace only separates. The UTF-8 bytes of each piece
    are merged pair by pair. HTML entities and wrongly decoded characters stay as they are written.
    """

    def __call__(self, texts: str | list[str]) -> LongTensor:
        """One text or B texts to ids (B, 77), int64: START, at most 75 tokens, END to the end.

        SD 1.5 pads with END; open_clip's own tokenizer pads with 0. What a longer text has after
        its 75th token is dropped. Raises ImportError, with what to install, where open_clip_torch
        is missing.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = [[START, *islice(_tokens(text), LENGTH - 2)] for text in texts]
        rows = [row + [END] * (LENGTH - len(row)) for row in rows]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, LENGTH)      # (B, L)


def _tokens(text: str) -> Iterator[int]:
    """The ids of a text, one by one, so that what is cut off is never computed."""
    special, piece = _patterns()
    for part in special.split(text):
        if part in SPECIAL:
            yield SPECIAL[part]
        else:  # lowered letter by letter: str.lower() gives a sigma that ends a word another form
            lowered = "".join(map(str.lower, normalize("NFC", part)))
            yield from chain.from_iterable(_merge(p.group()) for p in piece.finditer(lowered))


@functools.lru_cache(maxsize=1 << 16)
def _merge(piece: str) -> tuple[int, ...]:
    """The ids of one piece of text, by byte-pair encoding.

    The id of a merge is also its rank: of all pairs that merge, the one with the lowest id goes
    first, wherever it occurs, from the left.
    """
    byte_ids, merges = _vocabulary()
    ids = [byte_ids[byte] for byte in piece.encode()]
    ids[-1] += 256  # the same byte, as the last of a piece
    while found := [merges[pair] for pair in pairwise(ids) if pair in merges]:
        first, before, ids = min(found), ids, []
        for i in before:
            if ids and merges.get((ids[-1], i)) == first:
                ids[-1] = first
            else:
                ids.append(i)
    return tuple(ids)


@functools.cache
def _vocabulary() -> tuple[dict[int, int], dict[tuple[int, int], int]]:
    """The id of each byte, and for each pair of ids that merges the id of the two together.

    Ids 0 to 255 are the bytes and 256 to 511 the bytes that end a piece; the merges follow in the
    order of the file, then START and END.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_ids = {b: i for i, b in enumerate(printable + others)}
    # The file writes a printable byte as its own character, the others as characters from 256 on.
    symbols = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    ids = {s: i for i, s in enumerate(symbols + [s + "</w>" for s in symbols])}
    merges = {}
    lines = gzip.decompress(_vocabulary_file().read_bytes()).decode().split("\n")
    for i, line in enumerate(lines[1 : START - 512 + 1], start=512):  # line 0 is a version
        left, right = line.split()
        merges[ids[left], ids[right]] = ids[left + right] = i
    return byte_ids, merges


def _vocabulary_file() -> Path:
    """The file inside open_clip_torch, found without importing that package (and torchvision)."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise ImportError(_MISSING)
    return Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"


@functools.cache
def _patterns() -> tuple:
    """Two compiled expressions: for the special tokens, and for a piece of the text between."""
    try:
        import regex  # comes with open_clip_torch; Python's own re does not know letters as \p{L}
    except ImportError as error:
        raise ImportError(_MISSING) from error
    special = regex.compile("(" + "|".join(map(regex.escape, SPECIAL)) + ")")
    piece = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    return special, piece
