"""clip_text.py against transformers: the same ids for any text, the same states for any weights."""

import random
import unicodedata

import pytest
import references
import torch
from references import reference_text_encoder, text_weights
from torch import Tensor

import clip_text
from clip_text import END, START, TextConfig, TextEncoder, Tokenizer

SMALL = TextConfig(vocab_size=1000, positions=77, width=64, layers=3, heads=4)

TEXTS = [
    # Ordinary prompts
    "a photo of a cat",
    "A photograph of an astronaut riding a horse",
    "Portrait of a Woman, oil on canvas, by REMBRANDT, 4K, trending on ArtStation",
    "((masterpiece)), [best quality], {detailed:1.3}, (hands:-1), --ar 16:9",
    "mIxEd CaSe WoRdS aNd ACRONYMS like NASA, USA, iPhone",
    "a very, very; punctuated: sentence... with (brackets) & symbols -- all of it!?",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "x",
    "snake_case and kebab-case and path/to/file.txt",
    "https://example.com/a?b=c&d=e#f user@example.org #hashtag @mention",
    # Nothing, or whitespace only
    "",
    " ",
    "   \t\n  ",
    "\u3000\u00a0\u2003",
    # Odd whitespace
    "  leading and trailing  ",
    "tabs\tand\nnew\r\nlines\vand\fmore",
    "no\u00a0break em\u2003space ideographic\u3000space next\u0085line line\u2028separator",
    "zero\u200bwidth joiner\u200dnon\u200cjoiner bom\ufeffmark mongolian\u180evowel",
    # Digits
    "1234567890",
    "3.14159, 1e-5, 50%, $100, 2024-06-17",
    "8k 4x4 mp3 h264 b2b",
    "½ ¼ ² ³ ₂ Ⅷ ⅻ ① ٣٤٥ १२३ 一二三",
    # Apostrophes and contractions
    "it's I'll we're they've I'm you'd can't",
    "IT'S I'LL WE'RE THEY'VE I'M YOU'D CAN'T",
    "'s 't 're 've 'm 'll 'd 'x",
    "rock 'n' roll, the dogs' bowls, o'clock, ''quoted''",
    "it’s a ‘curly’ “quote” – dash — em…",
    "don'tt s's's y'all'd've",
    # HTML
    "&amp; &lt;b&gt;bold&lt;/b&gt; &quot;x&quot; &#39; &nbsp;",
    "<div class='a'>text</div><br/>",
    "&amp;amp;amp;",
    # Accents, composed and not
    "café naïve Ångström Zürich señor façade crème brûlée",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m",
    "ÀÉÎÕÜ ÇÑ ØÅÆ ÐÞ ŁŻŹ ŐŰ ŠČŘŽ",
    "tiếng Việt có dấu",
    "q\u0323\u0307 and q\u0307\u0323, z\u0335a\u0334l\u0337g\u0338o\u0336",
    # Case that is not one letter to one letter, or depends on its place
    "İstanbul ve Iğdır ıI",
    "ΟΔΥΣΣΕΥΣ ΣΑΣ Σ",
    "Straße STRASSE ẞ",
    "ﬁ ﬂ ﬀ ligatures, Dž Lj Nj digraphs",
    "fullwidth ＡＢＣ１２３！",
    "𝐁𝐨𝐥𝐝 𝓈𝒸𝓇𝒾𝓅𝓉 𝔣𝔯𝔞𝔨𝔱𝔲𝔯",
    # Scripts
    "一只猫的照片",
    "猫の写真、カタカナとひらがな。",
    "ｶﾀｶﾅ がぎぐ か\u3099",
    "고양이 사진",
    "\u1100\u1161\u11a8 conjoining",
    "Фотография кота в шляпе",
    "φωτογραφία μιας γάτας",
    "صورة قطة جميلة",
    "תמונה של חתול",
    "עִבְרִית with English in the middle العربية",
    "\u202eright to left override\u202c",
    "बिल्ली की तस्वीर",
    "ภาพถ่ายของแมว",
    "படம் ছবি ფოტო լուսանկար ፎቶ",
    "𒀀𒁀 𓀀𓁐 𠜎𠜱",
    # Emoji
    "🎉",
    "a cat 🐱 and a dog 🐶🐶🐶",
    "👨‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇯🇵 1️⃣ ❤️",
    "¯\\_(ツ)_/¯ ಠ_ಠ ʕ•ᴥ•ʔ",
    # Control characters and others that are rarely typed
    "null\x00bell\x07escape\x1b[0m",
    "\x01\x02\x1c\x1d\x1e\x1f\x7f\x80\x9f",
    "replacement \ufffd private \ue000 nonchar \uffff",
    "soft\u00adhyphen",
    "∑∫√∞ ≤≥≠ ←↑→ ♠♣♥ █▓▒ ™®©",
    # Special tokens, written out
    "<|startoftext|>",
    "before<|endoftext|>after <|endoftext|><|endoftext|>",
    "<|EndOfText|> <|endoftext <|pad|>",
    # Mojibake stays as it is
    "schÃ¶n, donâ€™t",
    # Long
    " ".join(["a painting of a red fox in the snow"] * 40),
    " ".join(f"word{i}" for i in range(300)),
    "supercalifragilistic" * 20,
    "猫" * 200,
    "🎉" * 100,
    "!" * 300,
    "a " * 74 + "b",
    "a " * 75 + "b",
    "a " * 76 + "b",
]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Strings of up to 60 characters, dense in the blocks that behave oddly.

    All are of Unicode 3.2, so that the two sides agree on them whichever tables they were built
    with; newer characters are among TEXTS.
    """
    blocks = [(0, 0x80), (0, 0x800), (0x2000, 0x2100), (0x3000, 0x3100), (0, 0x30000)]
    categories = unicodedata.ucd_3_2_0.category
    characters = [
        [c for c in map(chr, range(*block)) if categories(c) not in ("Cs", "Cn")]
        for block in blocks
    ]
    rng = random.Random(seed)
    return [
        "".join(rng.choice(rng.choice(characters)) for _ in range(rng.randrange(60)))
        for _ in range(count)
    ]


# ------------------------------------------------------------------------------- the tokenizer


@pytest.fixture(scope="module")
def reference_tokenizer(tmp_path_factory):
    return references.reference_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def reference_ids(tokenizer, texts: list[str]) -> Tensor:
    encoded = tokenizer(
        texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return encoded.input_ids


def test_ids_equal_transformers(reference_tokenizer):
    assert len(TEXTS) >= 60
    for text in TEXTS:
        expected = reference_ids(reference_tokenizer, [text])
        assert Tokenizer()(text).equal(expected), repr(text)


def test_ids_of_random_unicode_equal_transformers(reference_tokenizer):
    texts = random_texts(1000)
    ours, expected = Tokenizer()(texts), reference_ids(reference_tokenizer, texts)
    different = (ours != expected).any(dim=1).nonzero().flatten().tolist()
    assert not different, repr(texts[different[0]])


def test_a_prompt_by_hand():
    ids = Tokenizer()("a photo of a cat")
    assert ids.shape == (1, 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == [START, 320, 1125, 539, 320, 2368] + [END] * 71


def test_padding_and_truncation():
    empty, full, cut = Tokenizer()(["", "cat " * 75, "cat " * 76])
    assert empty.tolist() == [START] + [END] * 76
    assert full.tolist() == [START] + [2368] * 75 + [END]
    assert cut.equal(full)


def test_a_batch_is_its_rows():
    tokenizer, texts = Tokenizer(), TEXTS[:10]
    assert tokenizer(texts).equal(torch.cat([tokenizer(t) for t in texts]))
    assert tokenizer([]).shape == (0, 77)


def test_without_the_vocabulary_package(monkeypatch):
    monkeypatch.setattr(clip_text.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        clip_text._vocabulary_file()


# ------------------------------------------------------------------------------- the network


def some_ids(config: TextConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, 77), generator=torch.Generator().manual_seed(1))


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return ((ours.float() - expected).abs().max() / expected.abs().max()).item()


def with_weights(weights: dict[str, Tensor], config: TextConfig) -> TextEncoder:
    with torch.device("meta"):
        encoder = TextEncoder(config)
    encoder.load_state_dict({k: v.clone() for k, v in weights.items()}, assign=True)
    return encoder.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small():
    """Weights by our names, which are transformers' own, ids, and the states expected of them."""
    model, ids = reference_text_encoder(SMALL), some_ids(SMALL)
    weights = {k: v for k, v in text_weights(model).items() if "position_ids" not in k}
    return weights, ids, model(ids).last_hidden_state


def test_states_equal_transformers(small):
    weights, ids, expected = small
    assert relative_error(with_weights(weights, SMALL)(ids), expected) < 1e-5


def test_every_weight_matters(small):
    """The comparison above can fail: one changed tensor, whichever it is, moves the states."""
    weights, ids, expected = small
    for name in weights:
        if name.endswith("k_proj.bias"):
            continue  # softmax cancels what is the same for all keys
        encoder = with_weights(weights | {name: weights[name].roll(1, 0)}, SMALL)
        assert relative_error(encoder(ids), expected) > 1e-3, name


@pytest.mark.full
def test_full_size_equals_transformers():
    config = TextConfig()
    model, ids = reference_text_encoder(config), some_ids(config)
    encoder = with_weights(text_weights(model), config)
    assert relative_error(encoder(ids), model(ids).last_hidden_state) < 1e-4


def test_parameter_count():
    with torch.device("meta"):
        encoder = TextEncoder()
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480


def test_sizes_that_make_no_network():
    with pytest.raises(ValueError, match="heads"):
        TextConfig(width=64, heads=5)


def test_attention_is_causal():
    torch.manual_seed(0)
    encoder, ids = TextEncoder(SMALL).eval(), some_ids(SMALL)
    other = ids.clone()
    other[:, 40] = (other[:, 40] + 1) % SMALL.vocab_size
    a, b = encoder(ids), encoder(other)
    assert torch.allclose(a[:, :40], b[:, :40], atol=1e-6)
    assert (a[:, 40:] - b[:, 40:]).abs().amax(dim=(0, 2)).min() > 1e-4


@pytest.mark.full
def test_compiled_equals_eager(small):
    weights, ids, _ = small
    encoder = with_weights(weights, SMALL)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(ids), encoder(ids)) < 1e-5
