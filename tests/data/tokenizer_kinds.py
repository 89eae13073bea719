"""Small tokenizers of many habits, trained on one line, and plain chat templates."""

import functools
import string

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

WORDS = "hello world, the  world\nsays: hello there! an answer to the question is 42"
SPECIALS = ["<s>", "</s>", "<|turn|>", "<|im_end|>"]
KINDS = ["byte", "metaspace", "unigram", "prepend"]  # how text is spelt
ENDS = ["no_bos", "one_special", "adds_bos", "adds_bos_and_eos"]  # and begun and ended
# Writes a newline after the end of turn, as ChatML does.
CHATML = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# Ends the conversation with an EOS of its own, after the end of turn.
WITH_BOS_AND_EOS = (
    "{{ bos_token }}" + CHATML + "{% if not add_generation_prompt %}</s>{% endif %}"
)
# Shows thoughts in the last message alone.
LAST_ONLY = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content if loop.last else m.content.replace('think:', '') }}",
)


@functools.cache
def train(kind):
    """A small tokenizer; its ids 0 to 3 are `SPECIALS`."""
    shared = {"vocab_size": 400, "special_tokens": SPECIALS, "show_progress": False}
    corpus = [WORDS, "hello world says the answer"] * 4
    if kind == "byte":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **shared)
    elif kind == "metaspace":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        # What is not in the alphabet it drops without a word.
        alphabet = list(string.ascii_letters)
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **shared)
    elif kind == "prepend":  # as Llama 2 and stories260k: blanks become letters
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        shared["vocab_size"] = 330
        shared["special_tokens"] = [*SPECIALS, *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(**shared)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
        tokenizer.decoder = decoders.Metaspace()
        shared["special_tokens"] = [*SPECIALS, "<unk>"]
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **shared)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


def make(kind="byte", ends="adds_bos", *, special=(), **tokens):
    """A Hugging Face tokenizer of a kind, with one of the habits of `ENDS`.

    `special` are further special tokens; `tokens` name those with a role.
    """
    backend = Tokenizer.from_str(train(kind))
    backend.add_special_tokens(list(special))
    steps = [processors.ByteLevel(trim_offsets=True)] if kind == "byte" else []
    if ends.startswith("adds_bos"):
        single = "<s> $A </s>" if ends == "adds_bos_and_eos" else "<s> $A"
        ids = [("<s>", 0), ("</s>", 1)]
        steps += [processors.TemplateProcessing(single=single, special_tokens=ids)]
    backend.post_processor = processors.Sequence(steps)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    if ends == "no_bos":
        del names["bos_token"]
    elif ends == "one_special":
        names = dict.fromkeys(["bos_token", "eos_token", "pad_token"], "</s>")
    if kind == "unigram":
        names["unk_token"] = "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names | tokens)
