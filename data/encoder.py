"""A tokenizer for `python -m data prepare`, of bytes or of transformers."""

import hashlib
import json
import os

import numpy as np

from .corpus import END_OF_DOCUMENT, token_dtype

DECODED_CHARACTERS = 2**14  # of one document per call, to see whether the tokenizer changes text


class Encoder:
    """A tokenizer that ends each document with the end-of-text token.

    vocab_size: token ids are smaller than this. sha256: of the vocabulary, to compare tokenizers;
    `bytes` for bytes. special_tokens: ids of other special tokens, or None, by transformers' names.
    """

    def __init__(self, name: str, end_of_text: str | None, allow_lossy: bool) -> None:
        """name: --tokenizer. end_of_text: --end-of-text; None for the tokenizer's own.
        allow_lossy: accept a tokenizer that changes text. Raises ValueError if the tokenizer cannot
        be loaded or has no such token.
        """
        self.name, self.allow_lossy, self.tokenizer = name, allow_lossy, None
        self.special_tokens = {"bos_token_id": None, "pad_token_id": None}
        if name == "bytes":
            self.end_of_text_id, self.sha256 = END_OF_DOCUMENT, "bytes"
            self.vocab_size = END_OF_DOCUMENT + 1
            return
        import transformers

        try:
            if name.endswith(".json"):
                self.tokenizer = transformers.PreTrainedTokenizerFast(
                    tokenizer_file=name,
                    model_input_names=["input_ids", "attention_mask"],  # those of a Llama
                )
            else:
                self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                    name,
                    trust_remote_code=False,  # the default asks the user
                )
        except Exception as error:  # of many types: the file is missing, damaged or not a tokenizer
            reason = str(error).strip().split("\n")[0]
            if "trust_remote_code" in str(error):
                reason = "it needs code of its own, which never runs; give a tokenizer.json"
            elif not os.path.exists(name):
                reason += f" (looked in {os.getcwd()})"
            raise ValueError(f"--tokenizer {name} cannot be loaded: {reason}") from None
        vocabulary = self.tokenizer.get_vocab()
        if end_of_text is None:
            end_of_text = self.tokenizer.eos_token
        if end_of_text not in vocabulary:
            which = f" {end_of_text!r}" if end_of_text else ""
            special = ", ".join(map(str, self.tokenizer.added_tokens_encoder)) or "none"
            raise ValueError(
                f"--tokenizer {name} has no end-of-text token{which}; choose one of "
                f"its tokens with --end-of-text (its special tokens: {special})"
            )
        self.tokenizer.eos_token = end_of_text  # the saved tokenizer must have it too
        self.end_of_text_id = vocabulary[end_of_text]
        self.special_tokens = {key: getattr(self.tokenizer, key) for key in self.special_tokens}
        self.vocab_size = max(vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()

    def encode(self, texts: list[str]) -> dict[str, list]:
        """Returns `tokens`, an array per text, `num_bytes`, each text's size in UTF-8, and
        `left_out`, None.
        """
        if self.tokenizer is None:
            ids = [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
        else:
            ids = self._ids(texts)
            if not self.allow_lossy:
                self._check_decoded(texts[0][:DECODED_CHARACTERS])
                if any(self.end_of_text_id in document for document in ids):
                    raise ValueError(
                        f"--tokenizer {self.name} encodes {self.tokenizer.eos_token!r} inside a "
                        f"document as the end-of-text token; use another, remove that from the "
                        f"texts, or accept it with --allow-lossy-tokenizer"
                    )
        tokens = [np.append(np.asarray(i, dtype=np.int64), self.end_of_text_id) for i in ids]
        largest = max(document.max() for document in tokens)
        if largest >= self.vocab_size:
            raise ValueError(
                f"--tokenizer {self.name} returned token id {largest}, but its vocabulary has "
                f"ids 0 to {self.vocab_size - 1}; use another tokenizer"
            )
        dtype = token_dtype(self.vocab_size)
        return {
            "tokens": [document.astype(dtype) for document in tokens],
            "num_bytes": [len(text.encode()) for text in texts],
            "left_out": [None] * len(texts),
        }

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,  # special tokens inside a text are text
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]

    def _check_decoded(self, text: str) -> None:
        """Raises ValueError if the text's tokens are decoded to another text."""
        decoded = self.tokenizer.decode(self._ids([text])[0], clean_up_tokenization_spaces=False)
        if decoded != text:
            begin = max(0, len(os.path.commonprefix([text, decoded])) - 20)
            raise ValueError(
                f"--tokenizer {self.name} changes text: {text[begin : begin + 40]!r} becomes "
                f"{decoded[begin : begin + 40]!r}; use another, or accept the loss with "
                f"--allow-lossy-tokenizer"
            )
