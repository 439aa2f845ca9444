"""Small tokenizers, made in the tests: byte-level BPE as GPT-2 has it, and SentencePiece with byte fallback."""

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<bos>", "<eos>"]
CORPUS = ["the cat sat on the mat, and the hat: 2024  1000\n", "don't, it's naïve — 12345 12 34\n\n  the end\t"] * 20
# As the authors' own tokenizer.json files have it, apart from the text under test.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), ByteLevel(add_prefix_space=False)]),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")), "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def byte_level(pre: str) -> Tokenizer:
    """A small byte-level BPE, trained here."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE[pre], decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """A small BPE in SentencePiece's way, with byte fallback."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [
        *SPECIAL,
        *alphabet,
        *"▁abcdehimnorst",
        "th",
        "▁t",
        "▁th",
        "▁the",
        "at",
        "▁c",
        "▁cat",
        "sat",
        "▁sat",
        "he",
    ]
    order = [("t", "h"), ("▁", "t"), ("a", "t"), ("▁", "th"), ("▁th", "e"), ("▁t", "he"), ("▁", "c"), ("▁c", "at")]
    order += [("s", "at"), ("▁", "sat"), ("h", "e"), ("▁t", "h")]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer.model = models.BPE(vocab=vocab, merges=order, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def save_words(tokenizer: Tokenizer, folder: Path, chat_template: str | None = None) -> int:
    """Put a tokenizer into a checkpoint's folder; its number of tokens."""
    bos, eos = "<bos>", "<eos>"
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    words.chat_template = chat_template
    words.save_pretrained(folder)
    return len(words)
