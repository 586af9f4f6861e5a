"""Writes qwen_subset_tokenizer.json: the part of Qwen's byte-level BPE that the texts of prompts.json can reach.

    python tests/golden/prompts/make_qwen_subset.py qwen.tiktoken

A token belongs to it if its bytes lie inside a word of these texts; the single bytes all do. On these texts the ids are
those of the whole vocabulary, since BPE never leaves a word. The list of ranks holds no merges: a token's last one is
found by merging its bytes with the lower ranks only, until two parts are left.
"""

import base64
import hashlib
import json
import re
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "prompts.json").read_text())
SPLIT = (  # Qwen2's words
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HIDDEN = [*range(33), *range(127, 161), 173]  # bytes that are no printable letter; BPE writes others for them
LETTERS = [chr(256 + HIDDEN.index(byte)) if byte in HIDDEN else chr(byte) for byte in range(256)]


def spelled(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[str, str]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [a + b for a, b in zip(parts, parts[1:])]
        i = min(range(len(joined)), key=lambda i: ranks.get(joined[i], ranks[token]))
        parts[i : i + 2] = [joined[i]]
    return spelled(parts[0]), spelled(parts[1])


def main(data: bytes) -> None:
    assert hashlib.sha256(data).hexdigest() == GOLDEN["tokenizer"]["sha256"], "another vocabulary"
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines())}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    special = GOLDEN["tokenizer"]["special"]
    texts = [case["prompt"] for case in GOLDEN["train_and_mmeb_eval"] + GOLDEN["readme_demo"]] + [*GOLDEN["segments"]]
    parts = re.split("|".join(map(re.escape, [*special, "<image>"])), "<image>".join(texts))
    words = {word for part in parts for word, _ in split.pre_tokenize_str(normalizers.NFC().normalize_str(part))}
    inside = {word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1)}
    kept = [token for token in sorted(ranks, key=ranks.get) if len(token) == 1 or spelled(token) in inside]
    merges = [last_merge(token, ranks) for token in kept if len(token) > 1]
    model = Tokenizer(models.BPE({spelled(token): ranks[token] for token in kept} | special, merges))
    model.normalizer, model.pre_tokenizer, model.decoder = normalizers.NFC(), split, decoders.ByteLevel()
    model.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    (HERE / "qwen_subset_tokenizer.json").write_text(model.to_str() + "\n", encoding="utf-8")


main(Path(sys.argv[1]).read_bytes())
