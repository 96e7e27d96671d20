"""The task's own tokenizer: one token per word, and a chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_minpro.tasks.arithmetic_chains.chains import words

END_TOKEN, PAD_TOKEN, UNKNOWN_TOKEN = "<|end|>", "<|pad|>", "<|unknown|>"
ROLE_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|{{ message['role'] }}|> {{ message['content'] }}"
    "{%- if message['role'] == 'assistant' %} <|end|>{% endif %} {% endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def build_tokenizer(directory: Path, *, modulus: int = 10) -> Any:
    """Make the task's own tokenizer, one token per word, and save it where transformers and SGLang load it.

    The vocabulary is padded with reserved tokens to a multiple of 8 (24 tokens for modulus 10) so that it divides over ranks.

    Args:
        directory: gets tokenizer.json and tokenizer_config.json (chat template inside); made if absent.
        modulus: of the chains; its digits are words.

    Returns:
        The transformers tokenizer.
    """
    import transformers  # here: seconds to import, needed once per base model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    known = words(modulus)
    special = [PAD_TOKEN, UNKNOWN_TOKEN, END_TOKEN, *ROLE_TOKENS]
    special += [f"<|reserved_{number}|>" for number in range(-(len(known) + len(special)) % 8)]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate([*known, *special])}, unk_token=UNKNOWN_TOKEN))
    model.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[word for word in special if word not in (PAD_TOKEN, UNKNOWN_TOKEN, END_TOKEN)],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    return tokenizer
