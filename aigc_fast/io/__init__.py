"""Files in, files out: model weights, tokenizers, data sets."""

from .digits import load_digits
from .gguf import GGUFFile, GGUFTensor, read_gguf
from .tokenizer import TextTokenizer, load_tokenizer

__all__ = ["GGUFFile", "GGUFTensor", "TextTokenizer", "load_digits", "load_tokenizer", "read_gguf"]
