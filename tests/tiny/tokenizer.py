"""The tiny model's tokenizer: byte-level BPE that restores any text; each digit is a token."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS: tuple[str, ...] = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
"""In the order of their ids. The first four ids and the spelling of all six are Gemma 4's."""

PIECES = r"\p{N}| ?\p{L}+| [-+*=] | ?[^\s\p{L}\p{N}]+|\s"
"""What BPE may merge within: a digit alone, a word with the space before it, a sign of arithmetic
with both spaces, other signs, a white space. As no other token ends in a space, a prompt's tokens
begin its document's."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)
"""Gemma 4's turns, without its system prompt and tools."""


def train_tokenizer(texts: Iterable[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `vocab_size` tokens trained on `texts`, for a model of `context` tokens.

    Encoding adds one BOS in front, unless `add_special_tokens=False` is asked for.
    """
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = Sequence(
        [Split(Regex(PIECES), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS.index("<bos>")
    backend.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=["<|turn>", "<turn|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
        padding_side="left",
    )
