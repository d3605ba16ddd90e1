"""Files in, files out: model weights and tokenizers."""

from .gguf import GGUFFile, GGUFTensor, read_gguf
from .tokenizer import TextTokenizer, load_tokenizer

__all__ = ["GGUFFile", "GGUFTensor", "TextTokenizer", "load_tokenizer", "read_gguf"]
